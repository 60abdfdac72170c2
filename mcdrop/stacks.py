"""Stacks of masks on the device: for each draw of a network its masks of some passes, kept while there is room."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mcdrop.locks import new_lock
from mcdrop.masks import BLOCKS, Site, draw
from mcdrop.telling import telling

__all__ = ["Bits", "Kept", "Span", "block_bytes", "expected_stack", "stack", "telling_stack"]

_SLAB = 4 * 2**20
_ALIGNED = 64
_PACKED = 2**16  # units of a pass from which a CPU keeps a bit for each: eight times as many passes fit
_EXPECTED = {"uniform": 0.5, "normal": 0.0}


class Span(NamedTuple):
    """Which passes: ``start`` to ``start + passes`` of a seed and a sampler."""

    passes: int
    seed: int
    start: int
    sampler: str

    def blocks(self) -> "list[Span] | None":
        """Gives the blocks of passes that are drawn together; None where these are not fewer than one of them."""
        size = BLOCKS[self.sampler][0][0] if BLOCKS[self.sampler] else 1
        if self.passes >= size:
            return None
        first, last = self.start // size, (self.start + self.passes - 1) // size
        return [Span(size, self.seed, block * size, self.sampler) for block in range(first, last + 1)]


class _Slabs:
    """Few large pieces of memory for what is kept long.

    Small pieces that stay, between large ones that come and go, would make the allocator take new memory for each of
    the large ones: 1.8 GB in 1500 passes of a network whose chunks take 16 MiB.
    """

    def __init__(self) -> None:
        self._slab: Tensor | None = None
        self._used = 0
        self._lock = new_lock()

    def moved(self, value: Any) -> Any:
        """Gives a small tensor of a CPU as a part of a slab; anything else as it is."""
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not 0 < value.nbytes < _SLAB // 4:
            return value
        with self._lock:
            if self._slab is None or self._used + value.nbytes > _SLAB:
                self._slab, self._used = torch.empty(_SLAB, dtype=torch.uint8, device="cpu"), 0
            start, self._used = self._used, self._used + -(-value.nbytes // _ALIGNED) * _ALIGNED
            place = self._slab[start : start + value.nbytes].view(value.dtype).view(value.shape)
        return place.copy_(value)


@dataclass
class Kept:
    """Tensors by key, the latest used first, bounded in bytes."""

    most: int
    held: OrderedDict[object, tuple[Any, int]] = field(default_factory=OrderedDict)
    size: int = 0
    lock: threading.Lock = field(default_factory=new_lock)
    slabs: "_Slabs" = field(default_factory=lambda: _Slabs())

    def clear(self) -> None:
        """Lets go of everything."""
        with self.lock:
            self.held.clear()
            self.size = 0

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Gives what is kept under a key, made anew where nothing is: a tensor, or several in tuples and lists."""
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key][0]
        made = tree_map(self.slabs.moved, make())
        size = sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor | Bits))
        with self.lock:
            if key not in self.held and size <= self.most:
                self.held[key] = made, size
                self.size += size
            while self.size > self.most:
                self.size -= self.held.popitem(last=False)[1][1]
        return made


class Bits:
    """Masks of large draws (T, ...), a bit a unit, such as those of weights; passes are cut out as of a tensor."""

    def __init__(self, masks: NDArray[np.bool_]) -> None:
        """Takes a byte a unit."""
        self._shape = masks.shape[1:]
        self._bits = np.packbits(masks.reshape(len(masks), -1), axis=1)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return self._bits.nbytes

    def __getitem__(self, passes: slice) -> Tensor:
        """Gives the masks of some passes, a byte a unit."""
        opened = np.unpackbits(self._bits[passes], axis=1, count=math.prod(self._shape))
        return torch.from_numpy(opened.view(np.bool_).reshape(-1, *self._shape))


def stack(site: Site, span: Span, device: torch.device) -> Tensor | Bits:
    """Gives the masks of a site (T, *shape): a byte or a bit a unit where they are kept or dropped, else numbers."""
    threads = torch.get_num_threads()
    drawn = draw(site, span.passes, seed=span.seed, start=span.start, sampler=span.sampler, threads=threads)
    if device.type == "cpu" and drawn.dtype == np.bool_ and math.prod(site.shape) >= _PACKED:
        return Bits(drawn)
    return torch.from_numpy(drawn).to(device)


def block_bytes(site: Site, device: torch.device) -> int:
    """Gives the memory of the masks of a site that are drawn at once, whatever is asked for, by any sampler."""
    passes, units = max(size for (size, _), *_ in filter(None, BLOCKS.values())), math.prod(site.shape)
    if site.kind != "bernoulli":
        return 4 * passes * units
    return passes * units // (8 if device.type == "cpu" and units >= _PACKED else 1)


def expected_stack(site: Site, device: torch.device) -> Tensor:
    """Gives a single mask (1, *shape) that holds the expectation of each unit.

    Rates keep all digits: a network turns them into its own type, as it does with what is kept or dropped.
    """
    expected = _EXPECTED.get(site.kind)
    if expected is None:
        return torch.full((1, *site.shape), 1 - site.p, dtype=torch.float64, device=device)
    return torch.full((1, *site.shape), expected, dtype=torch.float32, device=device)


def telling_stack(site: Site, device: torch.device) -> Tensor:
    """Gives the masks of two passes that tell, in which every unit differs."""
    half = torch.from_numpy(telling([site], 1, seed=0)[site.name])
    both = torch.cat([half, 1 - half])
    return (both.bool() if site.kind == "bernoulli" else both).to(device)
