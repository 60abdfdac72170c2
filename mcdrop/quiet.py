"""What other libraries say: kept away from those who cannot act on it, or cut to what a sentence of ours can hold."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mcdrop.locks import forkable

__all__ = ["ALONE", "first_line", "quiet"]

# Torch's tracers and compiler, and the filters of warnings, keep their state in the process: two threads in them at
# once leave it wrong for good. Held by one thread while it is there.
ALONE = forkable(threading.RLock())


@contextmanager
def quiet(most: int = logging.WARNING) -> Iterator[None]:
    """Silences warnings, and what this thread logs at a level or below; for one thread at a time."""
    mine = threading.get_ident()

    def shown(record: logging.LogRecord) -> bool:
        return record.thread != mine or record.levelno > most

    with ALONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handlers = _handlers()
        for handler in handlers:  # each gets a list of its own: another thread may be going through the old one
            handler.filters = [*handler.filters, shown]
        try:
            yield
        finally:
            for handler in handlers:
                handler.filters = [one for one in handler.filters if one is not shown]


def _handlers() -> list[logging.Handler]:
    """Whatever writes down what is logged."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [handler for one in loggers if isinstance(one, logging.Logger) for handler in one.handlers]
    return found if logging.lastResort is None else [*found, logging.lastResort]


def first_line(error: Exception) -> str:
    """Gives the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    text = f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text  # which says its key alone
    return text.splitlines()[0][:200]
