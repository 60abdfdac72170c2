"""Other libraries' reports about themselves, kept away from those who cannot act on them."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(most: int = logging.WARNING) -> Iterator[None]:
    """Silences warnings, and what is logged at a level or below."""
    before = logging.root.manager.disable
    logging.disable(most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
