"""Mean, variance and Monte Carlo error of passes that are few enough to be read at once.

Sums over all of them and over their blocks are products of one matrix, a third of the calls that sums made as passes
come take. No product mixes outputs: one that is infinite leaves the others as they are.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.blocks import Blocks, shares

__all__ = ["Found", "are_few", "over_blocks", "read_at_once", "squared"]

Array = NDArray[np.float64]

_FEW = 32  # numbers of one pass
_PASSES = 256  # above, parts are blocks instead of passes
_SMALL = 2**22  # parts squared times numbers of one: above, adding up by a matrix costs more than the calls it saves
_NUMBERS = 2**15  # of all passes: above, another array of them does


class Found(NamedTuple):
    """Mean and variance of one pass, the squared standard error of the mean, and its degrees of freedom."""

    mean: Array
    variance: Array
    error_squared: Array
    degrees: int


def read_at_once(values: Array, blocks: Blocks) -> Found:
    """Gives what ``Gathered.read`` gives of all passes (T, ...) in fewer calls: their sums are products of a matrix."""
    count, flat = len(values), values.reshape(len(values), -1)
    matrix, weights, left, degrees = _reading(count, blocks)
    first = flat[0]
    apart = flat - first
    sums = matrix @ (apart if count <= _PASSES else _united(apart, _unit(count, blocks)))
    total = sums[0]
    deviations = np.maximum(squared(apart) - total * total / count, 0.0)
    error = np.maximum(weights @ (sums * sums), 0.0) + deviations * left
    found = first + total / count, deviations / count + error, error
    mean, variance, error = (one.reshape(values.shape[1:]) for one in found)
    return Found(mean, variance, error, degrees)


def are_few(count: int, numbers: int, blocks: Blocks) -> bool:
    """Whether so many passes of so many numbers are read fastest at once."""
    return count * numbers <= _NUMBERS and _parts(count, blocks) ** 2 * numbers <= _SMALL


def _unit(count: int, blocks: Blocks) -> int:
    """How many passes are a part, of which sums over all of them and over blocks are made."""
    if count <= _PASSES:
        return 1
    return blocks[0][0] if blocks else count


def _parts(count: int, blocks: Blocks) -> int:
    return -(-count // _unit(count, blocks))


@lru_cache(maxsize=16)
def _reading(count: int, blocks: Blocks) -> tuple[Array, Array, float, int]:
    """Gives a matrix whose products with parts are sums over all of them, and then over the blocks that tell an error.

    The squares of the sums by the weights, and the passes' squared deviations by the number after them, make the
    squared error; the last is its degrees of freedom.
    """
    told, left = shares(count, blocks)
    unit, parts = _unit(count, blocks), _parts(count, blocks)
    rows, weights = [np.ones((1, parts))], [0.0]
    for share in told:
        whole, begin = np.repeat(np.eye(share.whole), share.size // unit, axis=1), share.begin // unit
        within = np.zeros((share.whole + 1, parts))
        within[:, begin : begin + whole.shape[1]] = [*whole, whole.sum(axis=0)]
        weight = share.number / ((share.whole - 1) * count**2)
        rows.append(within)
        weights += [weight] * share.whole + [-weight / share.whole]
    rest = left / ((count - 1) * count**2) if count > 1 else np.nan
    return np.concatenate(rows), np.array(weights), rest, (told[0].whole if told else count) - 1


def _united(parts: Array, size: int) -> Array:
    """Sums over blocks of a size, and over what is left at the end."""
    whole = len(parts) // size
    sums, rest = over_blocks(parts, whole, size), parts[whole * size :]
    return np.concatenate([sums, np.add.reduce(rest, axis=0, keepdims=True)]) if len(rest) else sums


def over_blocks(parts: Array, whole: int, size: int) -> Array:
    """Sums over whole blocks of a size."""
    if whole and parts[0].size <= _FEW:  # where inner loops would be short
        return np.add.reduceat(parts[: whole * size], np.arange(0, whole * size, size), axis=0)
    sums: Array = np.add.reduce(parts[: whole * size].reshape(whole, size, *parts.shape[1:]), axis=1)
    return sums


def squared(values: Array) -> Array:
    """The sum of squares over the first axis."""
    squares: Array
    if len(values) and values[0].size <= _FEW:
        squares = np.vecdot(values, values, axis=0)  # type: ignore[call-overload]
    else:
        squares = np.einsum("t...,t...->...", values, values)
    return squares
