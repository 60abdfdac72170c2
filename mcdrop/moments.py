"""Streaming moments over passes, and the Monte Carlo error that follows from them."""

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.at_once import Found, are_few, over_blocks, read_at_once, squared
from mcdrop.blocks import Blocks, shares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Found", "Gathered", "Summing", "mean_gap", "moments_of", "total_variance"]

Array = NDArray[np.float64]


class _Pieces(NamedTuple):
    """How further parts fall into blocks: ``head`` into one that has begun, then ``whole`` ones, and ``tail`` are left.

    ``closes`` says whether the block that has begun is whole then.
    """

    head: int
    closes: bool
    whole: int
    size: int
    tail: int

    @classmethod
    def of(cls, count: int, begun: int, size: int) -> "_Pieces":
        """Divides so many parts over blocks of a size, one of which has begun."""
        head = min(size - begun, count) if begun else 0
        whole, tail = divmod(count - head, size)
        return cls(head, begun + head == size, whole, size, tail)


class _Cut(NamedTuple):
    """Sums over the pieces of further parts, None where there is no head or tail."""

    head: Array | None
    closes: bool
    whole: Array
    tail: Array | None


class Summing(NamedTuple):
    """How further passes are summed up where they are, such as on a GPU: see ``sums``, which does it.

    ``of`` makes values of outputs there, in float64 or as the outputs are; ``first`` is the first pass of all (None: it
    is among these). ``levels`` says of each size of blocks how many parts are left out, and how many make a block; all
    blocks begin anew.
    """

    of: "Callable[[Tensor], Tensor]"
    first: Array | None
    levels: tuple[tuple[int, int], ...]


class _Sums(NamedTuple):
    """Sums over blocks of one size: of whole blocks, of their squares, and of what has come of the one that is not."""

    closed: Array | None = None
    squares: Array | None = None
    open: Array | None = None

    def add(self, cut: _Cut) -> "tuple[_Sums, Array | None]":
        """Gives the state after further parts, and the sums over the blocks that became whole; None where none did."""
        opened, sums = self.open, cut.whole
        if cut.head is not None:
            opened = _plus(opened, cut.head)
            if not cut.closes:
                return self._replace(open=opened), None
            sums, opened = np.concatenate([opened[None], sums]), None
        if cut.tail is not None:
            opened = cut.tail
        if not len(sums):
            return self._replace(open=opened), None
        closed, squares = np.add.reduce(sums, axis=0), squared(sums)
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

        The first size begins with pass 0. Each other one is a multiple of the one before, and its blocks are made of
        those; without any, passes are independent.
        """
        self.blocks, self.count = blocks, 0
        self._held: Array | None = None  # all passes so far, where they are few
        self._first: Array | None = None
        self._squares: Array | None = None
        self._sums = [_Sums()] * max(1, len(blocks))  # one for each size; of all passes, where they are independent

    def add(self, values: Array) -> None:
        """Adds further passes (t, ...), in order.

        The values are kept or written over: another array of their size would cost more than all that is done with it.
        """
        if not self.count and are_few(len(values), values[0].size, self.blocks):  # there may be no more
            self.count, self._held = len(values), values
            return
        self._settle()
        self._add(values)

    def _settle(self) -> None:
        """Adds the passes that are held to the sums."""
        if self._held is not None:
            values, self._held, self.count = self._held, None, 0
            self._add(values)

    def _add(self, values: Array) -> None:
        if self._first is None:
            self._first = values[0].copy()
        apart = np.subtract(values, self._first, out=values)
        self._merge(len(values), squared(apart), _cut(apart, self._pieces(len(values))))

    def summing(self, of: "Callable[[Tensor], Tensor]") -> Summing | None:
        """Says how further passes can be summed up elsewhere; None inside of a block."""
        if any(self.count > begin and (self.count - begin) % size for size, begin in self.blocks):
            return None
        self._settle()
        levels = tuple(
            (max(0, begin - max(self.count, first)) // below, size // below)
            for (below, first), (size, begin) in itertools.pairwise(((1, 0), *self.blocks))
        )
        return Summing(of, self._first, levels)

    def add_sums(self, count: int, sums: Array) -> None:
        """Adds so many further passes that were summed up as ``summing`` says."""
        if self._first is None:
            self._first = sums[0]
        self._squares = _plus(self._squares, sums[1])
        if not self.blocks:
            self._sums[0] = _Sums(open=_plus(self._sums[0].open, sums[2]))
        for k in range(len(self.blocks)):
            closed, squares, opened = sums[2 + 3 * k : 5 + 3 * k]
            held = self._sums[k]
            self._sums[k] = _Sums(_plus(held.closed, closed), _plus(held.squares, squares), opened)
        self.count += count

    def _pieces(self, count: int) -> _Pieces:
        """How the next passes fall into the smallest blocks; independent ones are the head of one without end."""
        if not self.blocks:
            return _Pieces(count, False, 0, 1, 0)
        size = self.blocks[0][0]
        return _Pieces.of(count, self.count % size, size)

    def _merge(self, count: int, squares: Array, cut: _Cut) -> None:
        self._squares = _plus(self._squares, squares)
        self._sums[0], whole = self._sums[0].add(cut)
        for k, ((below, first), (size, begin)) in enumerate(itertools.pairwise(self.blocks), start=1):
            if whole is None:
                break
            place, ratio = (max(self.count, first) - begin) // below, size // below  # of the next part, in parts
            parts = whole[-place:] if place < 0 else whole
            self._sums[k], whole = self._sums[k].add(_cut(parts, _Pieces.of(len(parts), max(0, place) % ratio, ratio)))
        self.count += count

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        self._settle()
        assert self._first is not None
        assert self._squares is not None
        some = Gathered(self.blocks)
        some.count, some._first, some._squares = self.count, self._first[which], self._squares[which]
        some._sums = [held.take(which) for held in self._sums]
        return some

    def read(self) -> Found:
        """Gives mean, variance and error.

        The error is read off the spread of the blocks' sums (replicated Latin hypercube sampling, Owen 1992), for each
        size on its own. It is exact in expectation where every pass is in a whole block of the largest size it can be
        in, and there are ``FEWEST_BLOCKS`` of each: for balanced passes at 64, and at each 64 more from 320 on. Else it
        errs on the wide side, since blocks that are too few count as smaller ones, or as independent passes; see
        ``shares``. Squared, it came out up to 2 times too large at 128 balanced passes; below 64 it is that of
        independent ones, and was 6 to 270 times too large.

        The variance is NaN for a single pass. ``E[deviations / T]`` is the variance less that of the mean; adding the
        squared error for the latter gives the usual T - 1 for independent passes and nearly T for balanced ones. So it
        is unbiased where the error is exact, and else too large by as much as that is: by less than 1 / T of it, up to
        7 % at 16 balanced passes and 3 % at 32.
        """
        if self._held is not None:
            return read_at_once(self._held, self.blocks)
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


def moments_of(passes: Iterable[NDArray[Any]]) -> Found:
    """Gives mean and variance of independent passes (...), one at a time; NaN where one is infinite or NaN."""
    gathered = Gathered()
    with np.errstate(invalid="ignore"):
        for one in passes:
            gathered.add(one[None].astype(np.float64))
        return gathered.read()


def total_variance(found: Found) -> float:
    """The variance of all outputs together but those that are infinite or NaN; never 0, so that shares are of it."""
    return max(float(np.nansum(found.variance)), 1e-300)


def mean_gap(found: Found, deterministic: NDArray[Any]) -> float:
    """The largest distance between the mean of passes and a deterministic output, in standard deviations."""
    std = np.sqrt(found.variance)
    floor = np.fmax.reduce(std, axis=None, initial=1e-300) * 1e-3
    with np.errstate(invalid="ignore"):
        gaps = np.abs(found.mean - deterministic) / np.maximum(std, floor)
    return float(np.fmax.reduce(gaps, axis=None, initial=0.0))


def _cut(parts: Array, pieces: _Pieces) -> _Cut:
    head, closes, whole, size, tail = pieces
    first = np.add.reduce(parts[:head], axis=0) if head else None
    rest = parts[head:]
    sums = over_blocks(rest, whole, size)
    return _Cut(first, closes, sums, np.add.reduce(rest[whole * size :], axis=0) if tail else None)


def _around_mean(squares: Array, total: Array, count: int) -> Array:
    """The sum of squared distances from the mean, of a sum of squares and a sum."""
    return np.maximum(squares - total * total / count, 0.0)


def _plus(one: Array | None, other: Array) -> Array:
    return other if one is None else one + other
