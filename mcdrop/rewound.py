"""Numbers that come twice, since a pass puts a state of torch's generator back, as ``torch.random.fork_rng`` does."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

__all__ = ["REWOUND", "rewinding"]

REWOUND = (
    "numbers that come again, since the state of torch's generator is put back (draw once and use that twice, or keep "
    "what is always the same in a buffer)"
)


@contextmanager
def rewinding(drawn: Callable[[], int], note: Callable[[], object]) -> Iterator[None]:
    """Calls ``note`` where this thread puts a generator's state back after draws, of which ``drawn`` is the number.

    Draws that become masks leave the generator where it is, so that its states tell nothing: the one that was read last
    is taken for the one that is put back. A profiling hook sees the calls, since the methods of a generator cannot be
    replaced; where somebody profiles already, nothing is seen.
    """
    read: dict[int, list[int]] = {}  # how many draws there were at each state that has not been put back yet

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or not isinstance(getattr(called, "__self__", None), torch.Generator):
            return
        if called.__name__ == "get_state":
            read.setdefault(id(called.__self__), []).append(drawn())
        elif called.__name__ == "set_state" and drawn() > (read.get(id(called.__self__)) or [0]).pop():
            note()

    if sys.getprofile() is not None:
        yield
        return
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
