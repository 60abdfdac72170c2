"""What a way of running passes is given, and what it gives back."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import mcdrop
from benchmarks.throughput.networks import Network

__all__ = ["MOST_BYTES", "Moments", "Run", "Setting", "Skipped", "moments"]

Moments = tuple[Tensor, Tensor]  # mean and variance over the passes, (N, D) each
Run = Callable[[int], Moments]  # of a seed, where the way has one

MOST_BYTES = {"cpu": 2**30, "cuda": 2**34}  # what repeated rows may take; on a CPU they are slower well before
_EXAMPLE = 8  # rows
_MODELS: WeakKeyDictionary[nn.Module, dict[Any, mcdrop.Model]] = WeakKeyDictionary()


class Skipped(Exception):
    """A way that is not run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """One case on one device.

    Attributes:
        network: what runs.
        net: the network itself, in eval mode; a way changes a copy of it alone.
        x: rows (N, ...).
        passes: how many.
        compiled: whether a way that compiles is run, which takes long.
    """

    network: Network
    net: nn.Module
    x: Tensor
    passes: int
    compiled: bool = False

    def copy(self) -> nn.Module:
        """Gives a network of the way's own."""
        return copy.deepcopy(self.net)

    def model(self, **asked: Any) -> mcdrop.Model:
        """Gives the network as mcdrop wraps it; once for all settings of one network."""
        models, key = _MODELS.setdefault(self.net, {}), tuple(sorted(asked.items()))
        if key not in models:
            models[key] = mcdrop.wrap(self.copy(), example=self.network.rows(_EXAMPLE).to(self.x.device), **asked)
        return models[key]

    @property
    def fits_repeated(self) -> bool:
        """Whether the rows of all passes can be held at once."""
        return len(self.x) * self.passes * self.network.row_bytes <= MOST_BYTES[self.x.device.type]


def moments(outputs: Tensor, dim: int = 0) -> Moments:
    """Gives mean and variance over the dimension of passes."""
    with torch.no_grad():
        return outputs.mean(dim), outputs.var(dim)
