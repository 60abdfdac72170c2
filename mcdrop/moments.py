"""Streaming moments over passes, and the Monte Carlo error that follows from them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_BLOCKS", "Gathered"]

Array = NDArray[np.float64]

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread


@dataclass(frozen=True)
class Gathered:
    """Sums over passes, and for passes that come in balanced blocks sums over the blocks.

    Passes are independent where ``block`` is 1. In a block of more they are not; whole blocks are, so the error of
    the mean is read off the spread of the block means (replicated Latin hypercube sampling, Owen 1992).

    Sums are of differences from the first pass, in float64. ``E[x^2] - E[x]^2`` loses its digits where the mean is
    large; the first pass is one of those whose variance is taken, so its squared distance from the mean is at most
    ``count`` variances, and no more digits are lost than ``count`` has.
    """

    block: int
    count: int = 0
    first: Array | None = None
    squares: Array | float = 0.0
    closed: Array | float = 0.0  # sum over the passes of whole blocks
    closed_squares: Array | float = 0.0  # sum over whole blocks of the square of their sum
    open: Array | float = 0.0  # sum over the passes of the last block, where it is not whole

    def add(self, values: NDArray[np.floating]) -> "Gathered":
        """Gives the state after further passes (t, ...), in order."""
        first = np.asarray(values[0], np.float64) if self.first is None else self.first
        apart = np.subtract(values, first, dtype=np.float64)
        squares: Array = np.einsum("t...,t...->...", apart, apart)
        count, block = len(apart), self.block
        sums = (
            (self.closed + np.add.reduce(apart, axis=0), self.closed_squares + squares, 0.0)
            if block == 1
            else self._blocks(apart)
        )
        return Gathered(block, self.count + count, first, self.squares + squares, *sums)

    def _blocks(self, apart: Array) -> tuple[Array | float, Array | float, Array | float]:
        """Adds passes to the sums over blocks: closed, their squares, open."""
        closed, closed_squares, opened, block = self.closed, self.closed_squares, self.open, self.block
        begun = self.count % block
        if begun:
            closing = min(block - begun, len(apart))
            opened = opened + np.add.reduce(apart[:closing], axis=0)
            apart = apart[closing:]
            if begun + closing == block:
                closed, closed_squares, opened = closed + opened, closed_squares + opened**2, 0.0
        blocks = len(apart) // block
        if blocks:
            by_block = np.add.reduce(apart[: blocks * block].reshape(blocks, block, *apart.shape[1:]), axis=1)
            closed = closed + np.add.reduce(by_block, axis=0)
            closed_squares = closed_squares + np.add.reduce(by_block * by_block, axis=0)
        if len(apart) % block:
            opened = np.add.reduce(apart[blocks * block :], axis=0)
        return closed, closed_squares, opened

    def take(self, which: NDArray[np.bool_]) -> "Gathered":
        """Gives the state of some rows."""
        sums = (self.first, self.squares, self.closed, self.closed_squares, self.open)
        return Gathered(self.block, self.count, *(s[which] if isinstance(s, np.ndarray) else s for s in sums))  # type: ignore[arg-type]

    @property
    def _closed_blocks(self) -> int:
        return self.count // self.block

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard error."""
        return (self._closed_blocks if self._closed_blocks >= FEWEST_BLOCKS else self.count) - 1

    @cached_property
    def _sum(self) -> Array:
        return np.asarray(self.closed + self.open)

    @property
    def mean(self) -> Array:
        """Mean of the passes."""
        assert self.first is not None
        return self.first + self._sum / self.count

    @cached_property
    def _deviations(self) -> Array:
        """Summed squared deviations from the mean."""
        return np.maximum(self.squares - self._sum * self._sum / self.count, 0.0)

    @cached_property
    def error_squared(self) -> Array:
        """Squared standard error of the mean; from above where balanced blocks are too few to tell.

        The whole blocks and the passes of the open one are independent, so their errors add; within the open one passes
        are negatively dependent, so that taking them as independent errs on the wide side.
        """
        count, blocks = self.count, self._closed_blocks
        if blocks < FEWEST_BLOCKS:
            return self._deviations / ((count - 1) * count) if count > 1 else np.full_like(self._deviations, np.nan)
        spread = np.maximum(self.closed_squares - self.closed * self.closed / blocks, 0.0)  # of the blocks' sums
        by_blocks = spread * (blocks / ((blocks - 1) * count**2))
        passes = count - blocks * self.block
        return by_blocks if not passes else by_blocks + self._deviations * (passes / ((count - 1) * count**2))

    @property
    def variance(self) -> Array:
        """Unbiased variance of one pass; NaN for a single one.

        ``E[deviations / T]`` is the variance less that of the mean; adding the latter back gives the usual T - 1 for
        independent passes and nearly T for balanced ones.
        """
        return self._deviations / self.count + self.error_squared
