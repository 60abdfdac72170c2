"""CUDA graphs: the passes of a small network take a GPU longer to start than to compute, so a run is recorded once.

What is recorded is the whole of a run, from weights to outputs or their sums. It reads the weights where they stand, so
numbers that change in place are seen; inputs and masks are copied to where the recording reads them.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcdrop.moments import Summing
from mcdrop.sums import summed_up

__all__ = ["Finish", "Recordings", "Run"]

_MOST = 32
_MOST_SEEN = 256
_LEFT: list[Any] = []  # memory that a failed recording may still be said to use
_TURN = threading.RLock()  # recordings share their memory, so they are made and played one at a time

Tensors = tuple[Tensor, ...]
Run = Callable[[tuple[Any, ...], Sequence[Tensor]], Tensors]


class Finish(NamedTuple):
    """What is made of a run's outputs: they, or what sums them up, and where it ``rides`` the last one on its own."""

    passes: int
    rides: bool
    summing: Summing | None

    def __call__(self, outputs: Tensor) -> Tensors:
        """Gives it."""
        wanted = outputs[: self.passes]
        found = wanted if self.summing is None else summed_up(wanted, self.summing)
        return (found, outputs[-1]) if self.rides else (found,)

    @property
    def together(self) -> int:
        """The number of passes that are run for it."""
        return self.passes + self.rides

    @property
    def key(self) -> object:
        """Tells apart what recordings of it do."""
        return self.passes, self.rides, self.summing and (self.summing.of, self.summing.levels)


@dataclass
class _Recording:
    """A graph, the tensors that it reads, the memory of the CPU that it writes to, and the masks it was given last."""

    graph: torch.cuda.CUDAGraph
    weights: list[Tensor]
    leaves: list[Tensor]
    masks: list[Tensor]
    found: Tensors
    given: Any = None

    def play(self, masks: tuple[Any, ...], leaves: Sequence[Tensor]) -> Tensors:
        """Gives what the run gives for these masks and leaves, on the CPU."""
        if self.masks and self.given is not masks:
            torch._foreach_copy_(self.masks, list(masks))
            self.given = masks
        torch._foreach_copy_(self.leaves, list(leaves))
        self.graph.replay()
        torch.cuda.current_stream(self.leaves[0].device).synchronize()  # the next one writes to the same memory
        return tuple(tensor.clone() for tensor in self.found)


class Recordings:
    """The recordings of a program by what tells its runs apart, the latest used kept; safe to use from several threads.

    A run is recorded when it is asked for the second time; its first time has made everything ready that cannot be
    recorded. Where a run cannot be recorded, none is from then on.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self._held: OrderedDict[object, _Recording] = OrderedDict()
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._possible = True

    def play(
        self, key: object, run: Run, weights: list[Tensor], masks: tuple[Any, ...], leaves: Sequence[Tensor]
    ) -> Tensors | None:
        """Gives what ``run(masks, leaves)`` gives with these weights; None where it is to be run as it is."""
        with _TURN:
            held = self._held.get(key)
            if held is None or held.weights is not weights:
                if not self._possible or not self._again(key):
                    return None
                held = _recorded(run, weights, masks, leaves)
                if held is None:
                    self._possible = False
                    return None
                self._held[key] = held
                if len(self._held) > _MOST:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return held.play(masks, leaves)

    def _again(self, key: object) -> bool:
        """Whether a key has been asked for before."""
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False


def _recorded(run: Run, weights: list[Tensor], masks: tuple[Any, ...], leaves: Sequence[Tensor]) -> _Recording | None:
    """Records a run; None where it does what no graph holds."""
    if not all(isinstance(mask, Tensor) for mask in masks):
        return None
    device = leaves[0].device
    own_masks, own_leaves = [mask.clone() for mask in masks], [leaf.clone() for leaf in leaves]
    graph, stream, current = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    collects = gc.isenabled()
    gc.disable()  # what it takes away may be another graph, which must not end while one is recorded
    try:
        with torch.cuda.stream(stream):
            before = run(tuple(own_masks), own_leaves)  # the libraries make what they need for this thread and stream
            found = tuple(torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in before)
            graph.capture_begin(pool=_anchor(device).pool(), capture_error_mode="thread_local")
            try:
                for here, there in zip(found, run(tuple(own_masks), own_leaves), strict=True):
                    here.copy_(there, non_blocking=True)
            finally:
                graph.capture_end()
    except RuntimeError:
        _recover(device)
        return None
    finally:
        if collects:
            gc.enable()
        current.wait_stream(stream)
    return _Recording(graph, weights, own_leaves, own_masks, found)


def _recover(device: torch.device) -> None:
    """Ends for torch's generator what a failed recording has begun (torch 2.11 to 2.13), and takes other memory."""
    with suppress(RuntimeError):
        _LEFT.append(_anchor(device))
        _anchor.cache_clear()
        _stream.cache_clear()
        with torch.cuda.stream(_stream(device)):
            _anchor(device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def _anchor(device: torch.device) -> torch.cuda.CUDAGraph:
    """Keeps the memory that all recordings compute in, which torch would take as ended with the last of them.

    They can share it, since none is played before what another one has found is on the CPU.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=device)
    graph.capture_end()
    return graph
