"""Streaming, mergeable moments over passes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation over the first axis, float64.

    Pieces merge by the pairwise update of Chan, Golub and LeVeque (1983), which keeps its digits where
    ``E[x^2] - E[x]^2`` loses them: a mean of 1e4 with a spread of 0.1 is no trouble.
    """

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike) -> "Moments":
        """Gives the moments of values (T, ...) over their first axis."""
        draws = np.asarray(values, np.float64)
        mean = draws.mean(axis=0)
        deviation = draws - mean
        return cls(len(draws), mean, np.einsum("t...,t...->...", deviation, deviation))

    def merge(self, other: "Moments") -> "Moments":
        """Gives the moments of both sets of values together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def variance(self) -> NDArray[np.float64]:
        """Unbiased variance (divided by count - 1); NaN for a single value."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.squares / (self.count - 1)
