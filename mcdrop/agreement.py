"""Whether two outputs agree: an infinity equals itself here, and so does NaN, such as in masked logits."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["difference", "identical", "largest", "told_apart"]

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


def told_apart(
    draws: Collection[_Draw], differs: Callable[[frozenset[_Draw], frozenset[_Draw]], bool]
) -> frozenset[_Draw]:
    """Says of which draws the entries of a row stand apart: the first ones of all rows before their second ones.

    So they stand where steps come before rows; else side by side, as heads of attention do.

    Args:
        draws: those with several entries for each row, one at least.
        differs: whether a row alone answers otherwise than among others, where the first ones are taken to stand apart
            and the second ones alone are on.
    """
    none, every = frozenset[_Draw](), frozenset(draws)
    if not differs(none, every):
        return none
    each = (frozenset({draw}) for draw in draws)
    return none.union(*(one for one in each if differs(none, one) and not differs(one, one)))


def _array(values: Any) -> NDArray[Any]:
    """An array as it is; a tensor as one, in a type that numpy has."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu()
    return np.asarray((tensor.float() if tensor.element_size() == 2 and tensor.is_floating_point() else tensor).numpy())
