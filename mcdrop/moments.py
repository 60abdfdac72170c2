"""Streaming moments over passes, and the Monte Carlo error that follows from them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_BLOCKS", "Found", "Gathered"]

Array = NDArray[np.float64]

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread


class Found(NamedTuple):
    """Mean and variance of one pass, the squared standard error of the mean, and its degrees of freedom."""

    mean: Array
    variance: Array
    error_squared: Array
    degrees: int


class _Sums(NamedTuple):
    """Sums over blocks of one size: of whole blocks, of their squares, and of what has come of the one that is not."""

    closed: Array | float = 0.0
    squares: Array | float = 0.0
    open: Array | float = 0.0

    def add(self, parts: Array, begun: int, size: int) -> "tuple[_Sums, Array | None]":
        """Gives the state after further parts (t, ...) of blocks of so many parts, and the sums that became whole."""
        opened, sums = self.open, None
        if begun:
            closing = min(size - begun, len(parts))
            opened, parts = opened + np.add.reduce(parts[:closing], axis=0), parts[closing:]
            if begun + closing < size:
                return self._replace(open=opened), None
            sums, opened = opened[None], 0.0
        whole, left = divmod(len(parts), size)
        if left:
            opened = np.add.reduce(parts[whole * size :], axis=0)
        if whole:
            found = np.add.reduce(parts[: whole * size].reshape(whole, size, *parts.shape[1:]), axis=1)
            sums = found if sums is None else np.concatenate([sums, found])
        if sums is None:
            return self._replace(open=opened), None
        return _Sums(self.closed + np.add.reduce(sums, axis=0), self.squares + _squared(sums), opened), sums

    def take(self, which: NDArray[np.bool_]) -> "_Sums":
        """Gives the state of some rows."""
        return _Sums(*(_some(sums, which) for sums in self))


class Gathered:
    """Sums over passes, and over the blocks in which they depend on one another.

    Sums are of differences from the first pass, in float64. ``E[x^2] - E[x]^2`` loses its digits where the mean is
    large; the first pass is one of those whose variance is taken, so its squared distance from the mean is at most
    ``count`` variances, and no more digits are lost than ``count`` has.
    """

    def __init__(self, blocks: tuple[tuple[int, int], ...] = ()) -> None:
        """Takes the blocks: pairs of their size and of the pass with which the first begins.

        Each size is a multiple of the one before, and its blocks are made of those; without any, passes are
        independent.
        """
        self.blocks, self.count = blocks, 0
        self._first: Array | None = None
        self._squares: Array | float = 0.0
        self._sums = [_Sums()] * max(1, len(blocks))  # one for each size; of all passes, where they are independent

    def add(self, values: Array) -> "Gathered":
        """Adds further passes (t, ...), in order, and gives itself.

        The values are written over: another array of their size would cost more than all that is done with it.
        """
        if self._first is None:
            self._first = values[0].copy()
        apart = np.subtract(values, self._first, out=values)
        self._squares = self._squares + _squared(apart)
        if not self.blocks:
            self._sums[0] = _Sums(open=self._sums[0].open + np.add.reduce(apart, axis=0))
        parts, below = apart, 1
        for k, (size, begin) in enumerate(self.blocks):
            place, ratio = (self.count - begin) // below, size // below  # of the next part, in parts
            parts = parts[-place:] if place < 0 else parts
            self._sums[k], whole = self._sums[k].add(parts, max(0, place) % ratio, ratio)
            if whole is None:
                break
            parts, below = whole, size
        self.count += len(apart)
        return self

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        assert self._first is not None
        some = Gathered(self.blocks)
        some.count, some._first = self.count, self._first[which]
        some._squares = _some(self._squares, which)
        some._sums = [held.take(which) for held in self._sums]
        return some

    def _enough(self) -> list[tuple[int, int, _Sums]]:
        """Sizes of blocks of which there are enough, largest first: size, how many there are, and their sums."""
        each = [(size, (self.count - begin) // size) for size, begin in self.blocks]
        return [(*each[k], self._sums[k]) for k in reversed(range(len(each))) if each[k][1] >= FEWEST_BLOCKS]

    @property
    def _total(self) -> Array:
        """The sum over all passes."""
        return np.asarray(self._sums[0].closed + self._sums[0].open)

    def read(self) -> Found:
        """Gives mean, variance and error.

        The error is exact in expectation where all passes are in whole blocks, else wider. Blocks that begin anew are
        independent, so it is read off the spread of their sums (replicated Latin hypercube sampling, Owen 1992), for
        each size on its own. Parts of a block are negatively dependent: taking those that are left over as independent,
        and all of them where the larger blocks are too few to tell, errs on the wide side.

        The variance is unbiased, and NaN for a single pass: ``E[deviations / T]`` is the variance less that of the
        mean; adding the latter back gives the usual T - 1 for independent passes and nearly T for balanced ones.
        """
        assert self._first is not None
        count = left = self.count
        total, enough = self._total, self._enough()
        deviations = _around_mean(self._squares, total, count)
        error: Array | None = None
        for size, whole, held in enough:
            number, left = (whole, left - whole * size) if left == count else divmod(left, size)
            of_these = _around_mean(held.squares, held.closed, whole) * (number / ((whole - 1) * count**2))
            error = of_these if error is None else error + of_these
        if left:
            of_these = deviations * (left / ((count - 1) * count**2) if count > 1 else np.nan)
            error = of_these if error is None else error + of_these
        assert error is not None
        degrees = (enough[0][1] if enough else count) - 1
        return Found(self._first + total / count, deviations / count + error, error, degrees)


def _squared(values: Array) -> Array:
    """The sum of squares over the first axis."""
    squares: Array = np.einsum("t...,t...->...", values, values)
    return squares


def _around_mean(squares: Array | float, total: Array | float, count: int) -> Array:
    """The sum of squared distances from the mean, of a sum of squares and a sum."""
    return np.maximum(squares - total * total / count, 0.0)


def _some(sums: Array | float, which: NDArray[np.bool_]) -> Array | float:
    return sums[which] if isinstance(sums, np.ndarray) else sums
