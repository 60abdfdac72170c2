"""Whether two outputs agree: an infinity equals itself here, and so does NaN, such as in masked logits."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["difference", "identical", "largest", "orders", "telling_rows", "told_orders"]

_FEWEST_TELLING, _MOST_TELLING = 3, 64  # rows

_Draw = TypeVar("_Draw")


def difference(got: Any, expected: Any, *, scale: float | None = None) -> float:
    """The largest difference of two arrays or tensors relative to ``scale``, the largest finite value of the second.

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
    return worst / (scale or largest(other))


def identical(one: Any, other: Any) -> bool:
    """Whether two arrays or tensors hold the same."""
    return np.array_equal(_array(one), _array(other), equal_nan=True)


def largest(values: Any) -> float:
    """The largest finite absolute value, never 0."""
    array = np.abs(_array(values))
    top = float(array.max(initial=0.0))
    return max(top if np.isfinite(top) else float(array[np.isfinite(array)].max(initial=0.0)), 1e-30)


def telling_rows(multiples: Sequence[int]) -> list[int]:
    """Gives numbers of rows, to try in turn, that tell in which order the entries of a row stand in some draws.

    They do so also where all entries of a row are added up: with a number that lacks a prime factor of theirs, a wrong
    order may only swap the masks of a row's entries. Several draws for which there is no such number give none.
    """
    count = math.prod({prime for multiple in multiples for prime in _primes(multiple)})
    while count < _FEWEST_TELLING:
        count *= 2
    if count <= _MOST_TELLING:
        return [count] if count == _FEWEST_TELLING else [count, _FEWEST_TELLING]
    return [_FEWEST_TELLING] if len(multiples) == 1 else []


def _primes(number: int) -> set[int]:
    found, prime = set[int](), 2
    while number > 1:
        if number % prime:
            prime += 1
        else:
            found.add(prime)
            number //= prime
    return found


def orders(multiple: int) -> list[int]:
    """Gives how many of a row's entries may stand before the rows: none, all, or a part of them."""
    return [1, multiple, *(outer for outer in range(2, multiple) if multiple % outer == 0)]


def told_orders(
    draws: Mapping[_Draw, Sequence[int]], differs: Callable[[Mapping[_Draw, int], frozenset[_Draw]], bool]
) -> dict[_Draw, int]:
    """Says of each draw in which of some orders the entries of a row stand; the first is the usual one.

    Args:
        draws: those with several entries for each row, one at least, and the orders that there are for each.
        differs: whether a row alone answers otherwise than among others, where they are taken to stand in some orders
            and some of the draws are on.
    """
    usual = {draw: choices[0] for draw, choices in draws.items()}
    if not differs(usual, frozenset(draws)):
        return usual
    found = {**usual}
    for draw, choices in draws.items():
        alone = frozenset({draw})
        fits = (order for order in choices if not differs({**usual, draw: order}, alone))
        found[draw] = next(fits, choices[0])
    return found


def _array(values: Any) -> NDArray[Any]:
    """An array as it is; a tensor as one, in a type that numpy has."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu()
    return np.asarray((tensor.float() if tensor.element_size() == 2 and tensor.is_floating_point() else tensor).numpy())
