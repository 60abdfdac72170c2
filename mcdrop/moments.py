"""Streaming moments over passes, and the Monte Carlo error that follows from them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_BLOCKS", "Blocks", "Found", "Gathered", "Share", "shares"]

Array = NDArray[np.float64]
Blocks = tuple[tuple[int, int], ...]  # their sizes, and the pass with which the first of each size begins

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread

_FEW = 32  # numbers of one pass


class Found(NamedTuple):
    """Mean and variance of one pass, the squared standard error of the mean, and its degrees of freedom."""

    mean: Array
    variance: Array
    error_squared: Array
    degrees: int


class Share(NamedTuple):
    """Passes whose error the blocks of one size tell: ``number`` of the ``whole`` ones there are.

    ``place`` is that of the size among all.
    """

    place: int
    size: int
    begin: int
    whole: int
    number: int


def shares(count: int, blocks: Blocks) -> tuple[list[Share], int]:
    """Divides passes among the sizes of which there are enough blocks, the largest first; and says how many are left.

    Blocks that begin anew are independent. Parts of a block are negatively dependent: taking those that are left over
    as independent, and all of them where the larger blocks are too few to tell, errs on the wide side.
    """
    found, left = [], count
    for place in reversed(range(len(blocks))):
        size, begin = blocks[place]
        whole = (count - begin) // size
        if whole >= FEWEST_BLOCKS:
            number = min(whole, left // size)
            found.append(Share(place, size, begin, whole, number))
            left -= number * size
    return found, left


class _Sums(NamedTuple):
    """Sums over blocks of one size: of whole blocks, of their squares, and of what has come of the one that is not."""

    closed: Array | None = None
    squares: Array | None = None
    open: Array | None = None

    def add(self, parts: Array, begun: int, size: int) -> "tuple[_Sums, Array | None]":
        """Gives the state after further parts (t, ...) of blocks of so many parts, and the sums that became whole."""
        opened, closing = self.open, None
        if begun:
            missing = min(size - begun, len(parts))
            opened, parts = _plus(opened, np.add.reduce(parts[:missing], axis=0)), parts[missing:]
            if begun + missing < size:
                return self._replace(open=opened), None
            closing, opened = opened[None], None
        sums, left = _block_sums(parts, size)
        if left is not None:
            opened = left
        if closing is not None:
            sums = np.concatenate([closing, sums])
        if not len(sums):
            return self._replace(open=opened), None
        closed, squares = np.add.reduce(sums, axis=0), _squared(sums)
        return _Sums(_plus(self.closed, closed), _plus(self.squares, squares), opened), sums

    def take(self, which: NDArray[np.bool_]) -> "_Sums":
        """Gives the state of some rows."""
        return _Sums(*(None if sums is None else sums[which] for sums in self))


class Gathered:
    """Sums over passes, and over the blocks in which they depend on one another.

    Sums are of differences from the first pass, in float64. ``E[x^2] - E[x]^2`` loses its digits where the mean is
    large; the first pass is one of those whose variance is taken, so its squared distance from the mean is at most
    ``count`` variances, and no more digits are lost than ``count`` has.
    """

    def __init__(self, blocks: Blocks = ()) -> None:
        """Takes the blocks: pairs of their size and of the pass with which the first begins.

        Each size is a multiple of the one before, and its blocks are made of those; without any, passes are
        independent.
        """
        self.blocks, self.count = blocks, 0
        self._first: Array | None = None
        self._squares: Array | None = None
        self._sums = [_Sums()] * max(1, len(blocks))  # one for each size; of all passes, where they are independent

    def add(self, values: Array) -> None:
        """Adds further passes (t, ...), in order.

        The values are written over: another array of their size would cost more than all that is done with it.
        """
        if self._first is None:
            self._first = values[0].copy()
        apart = np.subtract(values, self._first, out=values)
        self._squares = _plus(self._squares, _squared(apart))
        if not self.blocks:
            self._sums[0] = _Sums(open=_plus(self._sums[0].open, np.add.reduce(apart, axis=0)))
        parts, below = apart, 1
        for k, (size, begin) in enumerate(self.blocks):
            place, ratio = (self.count - begin) // below, size // below  # of the next part, in parts
            parts = parts[-place:] if place < 0 else parts
            self._sums[k], whole = self._sums[k].add(parts, max(0, place) % ratio, ratio)
            if whole is None:
                break
            parts, below = whole, size
        self.count += len(apart)

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        assert self._first is not None
        assert self._squares is not None
        some = Gathered(self.blocks)
        some.count, some._first, some._squares = self.count, self._first[which], self._squares[which]
        some._sums = [held.take(which) for held in self._sums]
        return some

    def read(self) -> Found:
        """Gives mean, variance and error.

        The error is exact in expectation where all passes are in whole blocks, else wider: it is read off the spread of
        the blocks' sums (replicated Latin hypercube sampling, Owen 1992), for each size on its own; see ``shares``.

        The variance is unbiased, and NaN for a single pass: ``E[deviations / T]`` is the variance less that of the
        mean; adding the latter back gives the usual T - 1 for independent passes and nearly T for balanced ones.
        """
        assert self._first is not None
        assert self._squares is not None
        count, (closed, _, opened) = self.count, self._sums[0]  # of all passes
        total = closed if opened is None else _plus(closed, opened)
        assert total is not None
        deviations, error = _around_mean(self._squares, total, count), None
        told, left = shares(count, self.blocks)
        for share in told:
            held = self._sums[share.place]
            assert held.squares is not None
            assert held.closed is not None
            spread = _around_mean(held.squares, held.closed, share.whole)
            error = _plus(error, spread * (share.number / ((share.whole - 1) * count**2)))
        if left:
            error = _plus(error, deviations * (left / ((count - 1) * count**2) if count > 1 else np.nan))
        assert error is not None
        degrees = (told[0].whole if told else count) - 1
        return Found(self._first + total / count, deviations / count + error, error, degrees)


def _block_sums(parts: Array, size: int) -> tuple[Array, Array | None]:
    """Gives the sums over whole blocks of parts, and over what is left, where something is."""
    whole, left = divmod(len(parts), size)
    if len(parts) and parts[0].size <= _FEW:  # one call instead of two, and short inner loops
        sums = np.add.reduceat(parts, range(0, len(parts), size), axis=0)
        return sums[:whole], sums[whole] if left else None
    sums = np.add.reduce(parts[: whole * size].reshape(whole, size, *parts.shape[1:]), axis=1)
    return sums, np.add.reduce(parts[whole * size :], axis=0) if left else None


def _squared(values: Array) -> Array:
    """The sum of squares over the first axis."""
    squares: Array
    if len(values) and values[0].size <= _FEW:
        squares = np.vecdot(values, values, axis=0)  # type: ignore[call-overload]
    else:
        squares = np.einsum("t...,t...->...", values, values)
    return squares


def _around_mean(squares: Array, total: Array, count: int) -> Array:
    """The sum of squared distances from the mean, of a sum of squares and a sum."""
    return np.maximum(squares - total * total / count, 0.0)


def _plus(one: Array | None, other: Array) -> Array:
    return other if one is None else one + other
