"""Summaries made by hand, the small networks, rows and audits that tests share, and a data frame."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import entr
from torch import Tensor, nn

import mcdrop
from mcdrop.audit import Audit
from mcdrop.summaries import Classes, Summary

Array = NDArray[np.float64]

EIGHT = torch.linspace(-1, 1, 32).reshape(4, 8)


def summary(mean: Any, epistemic: Any = 0.1, *, passes: int = 100, **more: Any) -> Summary:
    """A summary of a regression with the given mean (N, D) and epistemic variance."""
    mean = np.asarray(mean, np.float64)
    spread = np.broadcast_to(np.asarray(epistemic, np.float64), mean.shape).copy()
    count = np.full(len(mean), passes, np.int64)
    fields: dict[str, Any] = {
        "passes": count,
        "degrees": count - 1,
        "mean": mean,
        "epistemic": spread,
        "aleatoric": None,
        "standard_error": np.sqrt(spread / passes),
        "deterministic": mean,
        "samples": None,
        "support": (-np.inf, np.inf),
    }
    return Summary(**fields | more)


def classes(chances: Any) -> Summary:
    """A summary of a classifier with the given mean probabilities (N, C), all passes alike."""
    chances = np.asarray(chances, np.float64)
    entropy = entr(chances).sum(axis=-1)
    nothing = np.zeros_like(entropy)
    found = Classes(chances.argmax(axis=-1), entropy, entropy, nothing, nothing)
    return summary(chances, 0.0, support=(0.0, 1.0), classes=found)


def net(inputs: int = 2, outputs: int = 1, seed: int = 0) -> nn.Module:
    """A small network with one dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, outputs))


@dataclass(frozen=True)
class Frame:
    """What a data frame of pandas or polars does: columns by name, and an array of all of them."""

    columns: list[Any]
    data: NDArray[Any]

    def __getitem__(self, names: list[Any]) -> "Frame":
        return Frame(names, self.data[:, [self.columns.index(name) for name in names]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.data


def in_plain_python(seed: int) -> Iterator[float]:
    """Numbers from 0 to 1 of a generator that nobody can see in memory (Park and Miller 1988)."""
    state = seed + 1
    while True:
        state = 16807 * state % (2**31 - 1)
        yield state / (2**31 - 1)


class Skips(nn.Module):
    """Stochastic depth by whatever gives numbers, at a rate so low that hardly a pass shows it."""

    def __init__(self, numbers: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.numbers = nn.Linear(4, 4), numbers

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and self.numbers() < 1e-3 else x + torch.tanh(self.layer(x))


def audit_of(*layers: nn.Module, example: Tensor = EIGHT) -> Audit:
    return mcdrop.wrap(nn.Sequential(*layers).eval(), example=example).audit


def centred(channels: int) -> Tensor:
    """Four rows whose every channel has the mean 0."""
    rows = torch.randn(2, channels, generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, -rows])
