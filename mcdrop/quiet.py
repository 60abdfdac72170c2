"""What other libraries say: kept away from those who cannot act on it, or cut to what a sentence of ours can hold."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["first_line", "quiet"]


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


def first_line(error: Exception) -> str:
    """Gives the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
