"""Locks that a forked child finds free: whoever held one in the parent is no thread of the child's."""

import os
import threading
import weakref
from typing import Any, TypeVar

__all__ = ["forkable", "new_lock"]

_Lock = TypeVar("_Lock")
_ALL: "weakref.WeakSet[Any]" = weakref.WeakSet()


def forkable(given: _Lock) -> _Lock:
    """Gives a lock of Python's back, which a forked child finds free from now on."""
    _ALL.add(given)
    return given


def new_lock() -> threading.Lock:
    """Gives a new lock that a forked child finds free."""
    return forkable(threading.Lock())


def _free() -> None:
    for one in _ALL:
        one._at_fork_reinit()  # as Python does with its own


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_free)
