"""Locks that a forked child finds free, whoever held one in the parent, and one on a folder for all processes."""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "forkable", "new_lock"]

_Lock = TypeVar("_Lock")
_ALL: "weakref.WeakSet[Any]" = weakref.WeakSet()


def forkable(given: _Lock) -> _Lock:
    """Gives a lock of Python's back, which a forked child finds free from now on."""
    _ALL.add(given)
    return given


def new_lock() -> threading.Lock:
    """Gives a new lock that a forked child finds free."""
    return forkable(threading.Lock())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other thread or process is in here with the same folder; not where the system cannot tell.

    Raises:
        OSError: the folder cannot be opened.
    """
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no locks, or none on folders
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # not by closing alone: a child that was forked meanwhile has it open too
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)


def _free() -> None:
    for one in _ALL:
        one._at_fork_reinit()  # as Python does with its own


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_free)
