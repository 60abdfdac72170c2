"""Streaming, mergeable moments over passes, and the Monte Carlo error that follows from them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FEWEST_BLOCKS", "Gathered", "Moments"]

Array = NDArray[np.float64]

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation over the first axis, float64.

    Pieces merge by the pairwise update of Chan, Golub and LeVeque (1983), which keeps its digits where
    ``E[x^2] - E[x]^2`` loses them: a mean of 1e4 with a spread of 0.1 is no trouble.
    """

    count: int
    mean: Array
    squares: Array

    @classmethod
    def of(cls, values: ArrayLike) -> "Moments":
        """Gives the moments of values (T, ...) over their first axis."""
        draws = np.asarray(values, np.float64)
        mean = np.add.reduce(draws, axis=0) / len(draws)
        deviation = draws - mean
        return cls(len(draws), mean, np.einsum("t...,t...->...", deviation, deviation))

    def merge(self, other: "Moments") -> "Moments":
        """Gives the moments of both sets of values together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def take(self, which: NDArray[np.bool_]) -> "Moments":
        """Gives the moments of some rows, the first axis of mean and squares."""
        return Moments(self.count, self.mean[which], self.squares[which])

    @property
    def variance(self) -> Array:
        """Unbiased variance of independent values (divided by count - 1); NaN for a single value."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.squares / (self.count - 1)


def _merged(moments: Moments | None, values: Array) -> Moments:
    further = Moments.of(values)
    return further if moments is None else moments.merge(further)


@dataclass(frozen=True)
class Gathered:
    """Moments of all passes, and for passes that come in balanced blocks the moments of the block means.

    Passes are independent where ``block`` is 1. In a block of more they are not; whole blocks are, so the error of
    the mean is read off the spread of the block means (replicated Latin hypercube sampling, Owen 1992).
    """

    block: int
    whole: Moments | None = None
    means: Moments | None = None
    open_sum: Array | None = None
    open_count: int = 0

    def add(self, values: Array) -> "Gathered":
        """Gives the state after further passes (t, ...), in order."""
        piece = Moments.of(values)
        whole = piece if self.whole is None else self.whole.merge(piece)
        if self.block == 1:
            return Gathered(1, whole)
        means, total, count = self.means, self.open_sum, self.open_count
        closing = min(self.block - count, len(values)) if count else 0
        if closing:
            assert total is not None
            total, count = total + np.add.reduce(values[:closing], axis=0), count + closing
            if count == self.block:
                means, total, count = _merged(means, (total / count)[None]), None, 0
        blocks = (len(values) - closing) // self.block
        stop = closing + blocks * self.block
        if blocks:
            by_block = values[closing:stop].reshape(blocks, self.block, *values.shape[1:])
            means = _merged(means, np.add.reduce(by_block, axis=1) / self.block)
        if stop < len(values):
            total, count = np.add.reduce(values[stop:], axis=0), len(values) - stop
        return Gathered(self.block, whole, means, total, count)

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        return Gathered(
            self.block,
            None if self.whole is None else self.whole.take(which),
            None if self.means is None else self.means.take(which),
            None if self.open_sum is None else self.open_sum[which],
            self.open_count,
        )

    @property
    def _by_blocks(self) -> bool:
        return self.means is not None and self.means.count >= FEWEST_BLOCKS

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard error."""
        if self._by_blocks:
            assert self.means is not None
            return self.means.count - 1
        assert self.whole is not None
        return self.whole.count - 1

    @cached_property
    def error_squared(self) -> Array:
        """Squared standard error of the mean; from above where balanced blocks are too few to tell.

        The whole blocks and the passes of the open one are independent, so their errors add; within the open one passes
        are negatively dependent, so that taking them as independent errs on the wide side.
        """
        assert self.whole is not None
        total = self.whole.count
        if not self._by_blocks:
            return self.whole.variance / total
        assert self.means is not None
        closed = self.means.count * self.block
        by_blocks = self.means.variance / self.means.count * (closed / total) ** 2
        return by_blocks + self.whole.variance * (total - closed) / total**2

    @property
    def variance(self) -> Array:
        """Unbiased variance of one pass.

        ``E[squares / T]`` is the variance less that of the mean; adding the latter back gives the usual T - 1 for
        independent passes and nearly T for balanced ones.
        """
        assert self.whole is not None
        return self.whole.squares / self.whole.count + self.error_squared
