"""Whether two outputs agree: an infinity equals itself here, and so does NaN, such as in masked logits."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ROUNDING", "difference", "distance", "identical", "largest", "others_than_outputs", "told_orders", "uneven",
]  # fmt: skip

ROUNDING = {2: 2e-2, 4: 4e-6, 8: 8e-15}  # of a number of so many bytes, after other operations on one as large
_FEWEST_TELLING, _MOST_TELLING = 3, 64  # rows
_TRIES = 64  # orders of several draws at once

_Draw = TypeVar("_Draw")
_Differs = Callable[[Mapping[_Draw, int], frozenset[_Draw], Sequence[int]], bool | None]


def difference(
    got: Any, expected: Any, *, scale: float | None = None, passes: Any = None, by_output: bool = False
) -> float:
    """The largest difference of two arrays or tensors relative to ``scale``, the largest finite value of the second.

    ``passes`` (T, ...) are outputs under other masks, each like what is expected: then what masks move is relative to
    the farthest that they move it, beyond rounding; not to what they do not move, such as masked logits. With
    ``by_output`` it is relative to the farthest that they move the same output, whose units may be others.

    It is infinite where the shapes differ, or where one is infinite or NaN and the other is not the same.
    """
    one, other = _array(got), _array(expected)
    if one.shape != other.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    worst = float(apart.max(initial=0.0))
    if not np.isfinite(worst):
        apart[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
        worst = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
    if passes is None or not 0 < worst < np.inf:
        return worst / (scale or largest(other))
    return _by_what_moves(apart, other, passes, by_output)


def _by_what_moves(apart: NDArray[Any], expected: NDArray[Any], passes: Any, by_output: bool) -> float:
    values = _array(passes)
    with np.errstate(invalid="ignore"):
        spread = np.ptp(values, axis=0)
    moved = np.isfinite(spread) & (spread > 0)
    others = others_than_outputs(spread.ndim) if by_output else None
    farthest = np.max(spread, axis=others, where=moved, initial=0.0, keepdims=True)
    rounding = ROUNDING.get(passes.itemsize, 0.0) * np.where(moved, np.abs(values).max(axis=0), 0)
    still = float(np.where(moved, 0, apart).max()) / largest(expected)
    return max(still, float((np.where(moved, apart - rounding, 0) / np.maximum(farthest, 1e-30)).max()))


def others_than_outputs(axes: int) -> tuple[int, ...]:
    """The axes of what rows give (N, ...) but the one of outputs, or of channels: the one after the rows."""
    return tuple(axis for axis in range(axes) if axis != 1)


def identical(one: Any, other: Any) -> bool:
    """Whether two arrays or tensors hold the same."""
    return np.array_equal(_array(one), _array(other), equal_nan=True)


def distance(ones: Sequence[Any], others: Sequence[Any]) -> float:
    """How far apart the values of some outputs are, relative to the largest of the same output that are not the same.

    So what does not move, such as masked logits, does not count, nor do outputs in other units.
    """
    if len(ones) != len(others):
        return math.inf
    return max((_by_what_differs(_array(a), _array(b)) for a, b in zip(ones, others, strict=True)), default=0.0)


def _by_what_differs(one: NDArray[Any], other: NDArray[Any]) -> float:
    if identical(one, other):
        return 0.0
    if one.shape != other.shape or not np.issubdtype(one.dtype, np.inexact):
        return math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(one - other)
        differs = ~((one == other) | (np.isnan(one) & np.isnan(other)))
        across = others_than_outputs(one.ndim)
        scale = np.max(np.abs(other), axis=across, where=differs, initial=0, keepdims=True)
        relative = np.where(differs, off / np.maximum(scale, 1e-30), 0)
    return float(np.nan_to_num(relative, nan=np.inf, posinf=np.inf).max())


def largest(values: Any) -> float:
    """The largest finite absolute value, never 0."""
    array = np.abs(_array(values))
    top = float(array.max(initial=0.0))
    return max(top if np.isfinite(top) else float(array[np.isfinite(array)].max(initial=0.0)), 1e-30)


def uneven(passes: Any) -> float:
    """How far rows, which are one and the same, are from the first in passes (T, N, ...), as the difference is."""
    return difference(passes, np.broadcast_to(_array(passes)[:, :1], passes.shape), passes=passes)


def _telling_rows(multiples: Sequence[int]) -> list[int]:
    """Gives numbers of rows that together tell in which order the entries of a row stand in some draws.

    They do so also where all entries of a row are added up: with a number that lacks a prime factor of theirs, a wrong
    order may only swap the masks of a row's entries.
    """
    primes = sorted({prime for multiple in multiples for prime in _primes(multiple)})
    whole = math.prod(primes)
    counts = [whole] if whole <= _MOST_TELLING else [prime for prime in primes if prime <= _MOST_TELLING]
    return [count * -(-_FEWEST_TELLING // count) for count in counts]


def _primes(number: int) -> set[int]:
    found, prime = set[int](), 2
    while number > 1:
        if number % prime:
            prime += 1
        else:
            found.add(prime)
            number //= prime
    return found


def _orders(multiple: int) -> list[int]:
    """Gives how many of a row's entries may stand before the rows: none, all, or a part of them."""
    return [1, multiple, *(outer for outer in range(2, multiple) if multiple % outer == 0)]


def told_orders(multiples: Mapping[_Draw, int], differs: _Differs[_Draw]) -> dict[_Draw, int] | None:
    """Says of each draw how many of a row's entries stand before the rows, usually none; None where nothing fits.

    Args:
        multiples: how many entries a row has in a draw, for each that has several.
        differs: whether rows, which are one and the same, answer otherwise than one another, where they are given so
            many at a time, the draws are taken to stand in some orders and some of them are on; None where so many
            cannot be run.
    """
    # also a row alone, which has but one order: in a wrong one many rows may be even too, such as where all copies of
    # a row get one mask. Left out where it tells nothing, as of networks whose rows look at one another
    return _told(multiples, differs, (1,)) or _told(multiples, differs, ())


def _told(multiples: Mapping[_Draw, int], differs: _Differs[_Draw], beside: tuple[int, ...]) -> dict[_Draw, int] | None:
    choices = {draw: _orders(multiple) for draw, multiple in multiples.items()}
    everything = frozenset(multiples)

    def fits(outer: Mapping[_Draw, int], on: frozenset[_Draw]) -> bool:
        counts = _telling_rows([multiples[draw] for draw in on])
        told = [differs(outer, on, (*beside, count)) for count in counts]
        if all(one is None for one in told):
            told = [differs(outer, on, (*beside, _FEWEST_TELLING))]
        return False in told and True not in told

    usual = dict.fromkeys(multiples, 1)
    if fits(usual, everything):
        return usual
    alone: dict[_Draw, int] = {}
    for draw, some in choices.items():
        order = next((one for one in some if fits({**usual, draw: one}, frozenset({draw}))), None)
        if order is None:
            return None
        alone[draw] = order
    # some draws only show while others are on
    jointly = (dict(zip(choices, some, strict=True)) for some in itertools.product(*choices.values()))
    tries = (alone, *itertools.islice(jointly, _TRIES))
    return next((one for one in tries if fits(one, everything)), None)


def _array(values: Any) -> NDArray[Any]:
    """An array as it is; a tensor as one, in a type that numpy has."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu()
    return np.asarray((tensor.float() if tensor.element_size() == 2 and tensor.is_floating_point() else tensor).numpy())
