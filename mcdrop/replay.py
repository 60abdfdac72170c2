"""CUDA graphs: the passes of a small network take a GPU longer to start than to compute, so a run is recorded once.

What is recorded is the whole of a run, from weights to outputs or their sums. It reads the weights where they stand, so
numbers that change in place are seen; inputs and masks are copied to where the recording reads them.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcdrop.digits import WIDE
from mcdrop.moments import Summing
from mcdrop.sums import summed_up

__all__ = ["Finish", "Played", "Recordings", "Run"]

_MOST = 32
_MOST_SEEN = 256
_LEFT: list[Any] = []  # memory that a failed recording may still be said to use
_RECORDING = threading.Lock()
_MEMORY: dict[torch.device, "_Memory"] = {}

Tensors = tuple[Tensor, ...]
Run = Callable[[tuple[Any, ...], Sequence[Tensor]], Tensors]


class Finish(NamedTuple):
    """What is made of a run's outputs: they, or what sums them up and, where it ``rides``, the last one on its own."""

    passes: int
    rides: bool
    summing: Summing | None

    def __call__(self, outputs: Tensor) -> Tensors:
        """Gives it."""
        if self.summing is None:
            return (outputs,)
        sums = summed_up(outputs[: self.passes], self.summing)
        return (sums, outputs[-1]) if self.rides else (sums,)

    @property
    def together(self) -> int:
        """The number of passes that are run for it."""
        return self.passes + self.rides

    @property
    def key(self) -> object:
        """Tells apart what recordings of it do."""
        return self.passes, self.rides, self.summing and (self.summing.of, self.summing.levels)


class Played(NamedTuple):
    """What a run ``found``, on the CPU; ``finite`` says that all numbers it was given are, else nobody knows."""

    found: tuple[NDArray[Any], ...]
    finite: bool


@dataclass
class _Recording:
    """A graph, the tensors that it reads, the memory of the CPU that it writes to, and the masks it was given last.

    ``shapes`` are those of what it finds, which lie side by side in that memory.
    """

    graph: torch.cuda.CUDAGraph
    leaves: list[Tensor]
    masks: list[Tensor]
    memory: NDArray[Any]
    shapes: list[torch.Size]
    given: Any = None

    def play(self, masks: tuple[Any, ...], leaves: Sequence[Tensor]) -> Played:
        """Gives what the run gives for these masks and leaves."""
        if self.masks and self.given is not masks:
            torch._foreach_copy_(self.masks, list(masks))
            self.given = masks
        for own, leaf in zip(self.leaves, leaves, strict=True):
            own.copy_(leaf)
        self.graph.replay()
        torch.cuda.current_stream(self.leaves[0].device).synchronize()
        memory, found, begin = self.memory.copy(), [], 0  # the next one writes to the same memory
        for shape in self.shapes:
            end = begin + shape.numel()
            found.append(memory[begin:end].reshape(shape))
            begin = end
        return Played(tuple(found), bool(np.isfinite(memory[begin:]).all()))


class Recordings:
    """The recordings of a program by what tells its runs apart, the latest used kept; safe to use from several threads.

    A run is recorded when it is asked for the second time; its first time has made everything ready that cannot be
    recorded. Where a run cannot be recorded, none is from then on.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self._held: OrderedDict[object, _Recording] = OrderedDict()
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._weights: list[Tensor] | None = None  # of all that are held
        self._possible = True

    def play(
        self, key: object, run: Run, weights: list[Tensor], masks: tuple[Any, ...], leaves: Sequence[Tensor]
    ) -> Played | None:
        """Gives what ``run(masks, leaves)`` gives with these weights; None where it is to be run as it is."""
        if not self._possible:
            return None
        device = leaves[0].device
        memory = _MEMORY.get(device) or _MEMORY.setdefault(device, _Memory(device))
        with memory.turn:
            if self._weights is not weights:
                self._weights = weights
                self._held.clear()
                self._seen.clear()
            held = self._held.get(key) or self._second_time(memory, key, run, masks, leaves)
            if held is None:
                return None
            self._held.move_to_end(key)
            return held.play(masks, leaves)

    def _second_time(
        self, memory: "_Memory", key: object, run: Run, masks: tuple[Any, ...], leaves: Sequence[Tensor]
    ) -> _Recording | None:
        """Records a run whose key was asked for before."""
        if not self._again(key):
            return None
        try:
            self._held[key] = _recorded(memory, run, masks, leaves)
        except torch.OutOfMemoryError:  # which may not be so another time
            memory.recover()
            return None
        except RuntimeError:  # it does what no graph holds
            memory.recover()
            self._possible = False
            return None
        if len(self._held) > _MOST:  # and is not recorded again as soon as it is asked for
            self._seen.pop(self._held.popitem(last=False)[0], None)
        return self._held[key]

    def _again(self, key: object) -> bool:
        """Whether a key has been asked for before."""
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False


class _Memory:
    """What all recordings on one device compute in: they are made and played in turn, so that they can share it."""

    def __init__(self, device: torch.device) -> None:
        self.turn = threading.RLock()
        self._device = device
        self._held: tuple[torch.cuda.Stream, torch.cuda.CUDAGraph] | None = None

    def held(self) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
        """Gives the stream that is recorded, and a graph that keeps the memory: it would end with the last one else."""
        if self._held is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                torch.zeros(1, device=self._device)
                graph.capture_end()
            self._held = stream, graph
        return self._held

    def recover(self) -> None:
        """Ends for torch's generator what a failed recording has begun (torch 2.11 to 2.13), and takes other memory.

        A recording that succeeds ends it. The old memory may still be said to be in use.
        """
        _LEFT.append(self._held)
        self._held = None
        with suppress(RuntimeError), _without_collecting():
            self.held()


def _recorded(memory: _Memory, run: Run, masks: tuple[Any, ...], leaves: Sequence[Tensor]) -> _Recording:
    """Records a run; raises RuntimeError where that fails."""
    own_masks, own_leaves = [mask.clone() for mask in masks], [leaf.clone() for leaf in leaves]
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(leaves[0].device)
    with _without_collecting():
        stream, anchor = memory.held()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            before = run(tuple(own_masks), own_leaves)  # what the libraries need for this thread and stream is made
            there = _side_by_side(before, own_leaves)
            here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            graph.capture_begin(pool=anchor.pool(), capture_error_mode="thread_local")
            try:
                here.copy_(_side_by_side(run(tuple(own_masks), own_leaves), own_leaves), non_blocking=True)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    return _Recording(graph, own_leaves, own_masks, here.numpy(), [one.shape for one in before])


def _side_by_side(found: Tensors, leaves: Sequence[Tensor]) -> Tensor:
    """Puts all that leaves a GPU together, since each piece of memory takes a copy of its own.

    At the end are the sums of the leaves, which are finite only where all of these are.
    """
    dtype = torch.float64 if found[0].dtype in WIDE else torch.float32
    sums = [leaf.sum(dtype=torch.float32) for leaf in leaves if leaf.is_floating_point()]
    return torch.cat([one.reshape(-1).to(dtype) for one in (*found, *sums)])


@contextmanager
def _without_collecting() -> Iterator[None]:
    """What a collection takes away may be another graph, which must not end while one is recorded."""
    with _RECORDING:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()
