"""Stacks of masks on the device: for each draw of a network its masks of some passes, kept while there is room."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mcdrop.masks import Site, sample_masks

__all__ = ["Kept", "Span", "expected_stack", "stack"]

_EXPECTED = {"uniform": 0.5, "normal": 0.0}


@dataclass(frozen=True)
class Span:
    """Which passes: ``start`` to ``start + passes`` of a seed and a sampler."""

    passes: int
    seed: int
    start: int
    sampler: str


@dataclass
class Kept:
    """Tensors by key, the latest used first, bounded in bytes."""

    most: int
    held: OrderedDict[object, tuple[Any, int]] = field(default_factory=OrderedDict)
    size: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Gives what is kept under a key, made anew where nothing is: a tensor, or several in tuples and lists."""
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key][0]
        made = make()
        size = sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        with self.lock:
            if key not in self.held and size <= self.most:
                self.held[key] = made, size
                self.size += size
            while self.size > self.most:
                self.size -= self.held.popitem(last=False)[1][1]
        return made


def stack(site: Site, span: Span, device: torch.device) -> Tensor:
    """Gives the masks of a site (T, *shape): a byte a unit where they are kept or dropped, else real numbers."""
    drawn = sample_masks([site], span.passes, seed=span.seed, start=span.start, sampler=span.sampler)[site.name]
    mask = torch.as_tensor(drawn).to(device)
    return mask.bool() if site.kind == "bernoulli" else mask


def expected_stack(site: Site, device: torch.device) -> Tensor:
    """Gives a single mask (1, *shape) that holds the expectation of each unit."""
    return torch.full((1, *site.shape), _EXPECTED.get(site.kind, 1 - site.p), device=device)
