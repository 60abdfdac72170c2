"""``python -m service`` is ``mcdrop serve``."""

import sys

from mcdrop.cli import app

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]], prog_name="python -m service")
