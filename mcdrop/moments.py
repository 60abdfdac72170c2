"""Streaming moments over passes, and the Monte Carlo error that follows from them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_BLOCKS", "Gathered"]

Array = NDArray[np.float64]

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread


@dataclass(frozen=True)
class _Sums:
    """Sums over blocks of one size: of whole blocks, of their squares, and of what has come of the one that is not."""

    closed: Array | float = 0.0
    squares: Array | float = 0.0
    open: Array | float = 0.0

    def add(self, parts: Array, begun: int, size: int) -> tuple["_Sums", Array]:
        """Gives the state after further parts (t, ...) of blocks of so many parts, and the sums that became whole."""
        opened, whole = self.open, []
        if begun and len(parts):
            closing = min(size - begun, len(parts))
            opened, parts = opened + np.add.reduce(parts[:closing], axis=0), parts[closing:]
            if begun + closing == size:
                whole, opened = [opened[None]], 0.0
        blocks = len(parts) // size
        if blocks:
            whole.append(np.add.reduce(parts[: blocks * size].reshape(blocks, size, *parts.shape[1:]), axis=1))
        if len(parts) % size:
            opened = np.add.reduce(parts[blocks * size :], axis=0)
        if not whole:
            return _Sums(self.closed, self.squares, opened), parts[:0]
        sums = whole[0] if len(whole) == 1 else np.concatenate(whole)
        return _Sums(self.closed + np.add.reduce(sums, axis=0), self.squares + _squared(sums), opened), sums

    def take(self, which: NDArray[np.bool_]) -> "_Sums":
        """Gives the state of some rows."""
        return _Sums(*(_some(sums, which) for sums in (self.closed, self.squares, self.open)))


@dataclass(frozen=True)
class Gathered:
    """Sums over passes, and over the blocks in which they depend on one another.

    ``blocks`` are pairs: a size of blocks and the pass with which the first begins. Each size is a multiple of the one
    before, and its blocks are made of those; without any, passes are independent.

    Sums are of differences from the first pass, in float64. ``E[x^2] - E[x]^2`` loses its digits where the mean is
    large; the first pass is one of those whose variance is taken, so its squared distance from the mean is at most
    ``count`` variances, and no more digits are lost than ``count`` has.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    count: int = 0
    first: Array | None = None
    total: Array | float = 0.0
    squares: Array | float = 0.0
    sums: tuple[_Sums, ...] = ()  # one for each size of blocks

    def add(self, values: NDArray[np.floating]) -> "Gathered":
        """Gives the state after further passes (t, ...), in order."""
        first = np.array(values[0], np.float64) if self.first is None else self.first
        apart: Array = np.subtract(values, first, dtype=np.float64)
        sums, parts, below = [], apart, 1
        for held, (size, begin) in zip(self.sums or [_Sums() for _ in self.blocks], self.blocks, strict=True):
            place, ratio = (self.count - begin) // below, size // below  # of the next part, in parts
            found, parts = held.add(parts[max(0, -place) :], max(0, place) % ratio, ratio)
            sums.append(found)
            below = size
        total, squares = np.add.reduce(apart, axis=0), _squared(apart)
        if self.first is not None:
            total, squares = self.total + total, self.squares + squares
        return Gathered(self.blocks, self.count + len(apart), first, total, squares, tuple(sums))

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        first = None if self.first is None else self.first[which]
        sums = tuple(held.take(which) for held in self.sums)
        return Gathered(self.blocks, self.count, first, _some(self.total, which), _some(self.squares, which), sums)

    @cached_property
    def _enough(self) -> list[tuple[int, int, _Sums]]:
        """Sizes of blocks of which there are enough, largest first: size, how many there are, and their sums."""
        wholes = [(self.count - begin) // size for size, begin in self.blocks]
        found = [
            (size, whole, held)
            for (size, _), whole, held in zip(self.blocks, wholes, self.sums, strict=True)
            if whole >= FEWEST_BLOCKS
        ]
        return found[::-1]

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard error."""
        return (self._enough[0][1] if self._enough else self.count) - 1

    @property
    def mean(self) -> Array:
        """Mean of the passes."""
        assert self.first is not None
        return self.first + self.total / self.count

    @cached_property
    def _deviations(self) -> Array:
        """Summed squared deviations from the mean."""
        return _around_mean(self.squares, self.total, self.count)

    @cached_property
    def error_squared(self) -> Array:
        """Squared standard error of the mean: exact in expectation where all passes are in whole blocks, else wider.

        Blocks that begin anew are independent, so their error is read off the spread of their sums (replicated Latin
        hypercube sampling, Owen 1992), for each size on its own. Parts of a block are negatively dependent: taking
        those that are left over as independent, and all of them where the larger blocks are too few to tell, errs on
        the wide side.
        """
        left = self.count
        found: Array | float = 0.0
        for size, whole, held in self._enough:
            spread = _around_mean(held.squares, held.closed, whole)
            number, left = (whole, left - whole * size) if left == self.count else divmod(left, size)
            found = found + spread * (number / (whole - 1))
        if left:
            found = found + self._deviations * (left / (self.count - 1) if self.count > 1 else np.nan)
        return np.asarray(found / self.count**2)

    @property
    def variance(self) -> Array:
        """Unbiased variance of one pass; NaN for a single one.

        ``E[deviations / T]`` is the variance less that of the mean; adding the latter back gives the usual T - 1 for
        independent passes and nearly T for balanced ones.
        """
        return self._deviations / self.count + self.error_squared


def _squared(values: Array) -> Array:
    """The sum of squares over the first axis."""
    squares: Array = np.einsum("t...,t...->...", values, values)
    return squares


def _around_mean(squares: Array | float, total: Array | float, count: int) -> Array:
    """The sum of squared distances from the mean, of a sum of squares and a sum."""
    return np.maximum(squares - total * total / count, 0.0)


def _some(sums: Array | float, which: NDArray[np.bool_]) -> Array | float:
    return sums[which] if isinstance(sums, np.ndarray) else sums
