"""``python -m mcdrop`` is ``mcdrop``."""

from mcdrop.cli import main

if __name__ == "__main__":
    main()
