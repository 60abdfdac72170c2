"""Intervals, and what each may claim.

``confidence``: with endless passes the mean would lie here; Monte Carlo error only. ``credible``: the dropout posterior
of the mean function; epistemic, no promise about y. To add a method, add one function and one line to ``INTERVALS``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mcdrop.errors import InputError, UnknownName
from mcdrop.summaries import Summary

__all__ = ["INTERVALS", "Interval", "IntervalMethod", "check_level", "interval_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Bounds (N, D) at a level, with the method's name and the kind of its claim."""

    lower: Array
    upper: Array
    level: float
    name: str
    kind: str


@dataclass(frozen=True)
class IntervalMethod:
    """A method: bounds of a summary at a level, the kind of its claim, and whether it needs every pass."""

    bounds: Callable[[Summary, float], tuple[Array, Array]]
    kind: str
    needs_samples: bool = False


def check_level(level: float) -> float:
    """Gives the level if it lies between 0 and 1.

    Raises:
        InputError: it does not; 95 is meant as 0.95.
    """
    if isinstance(level, bool) or not isinstance(level, int | float | np.number) or not 0 < level < 1:
        meant = isinstance(level, int | float) and 1 < level < 100
        hint = f" (for {level:g} % give {level / 100:g})" if meant else ""
        raise InputError(f"level must be a number between 0 and 1, got {level!r}{hint}")
    return float(level)


def interval_of(name: str, summary: Summary, level: float) -> Interval:
    """Gives the named interval of a summary, kept inside the support of the mean function.

    Raises:
        InputError: an unknown name, or too few passes for the method at this level.
    """
    if name not in INTERVALS:
        raise UnknownName("interval", name, INTERVALS)
    method = INTERVALS[name]
    lower, upper = method.bounds(summary, level)
    return Interval(np.clip(lower, *summary.support), np.clip(upper, *summary.support), level, name, method.kind)


def _symmetric(centre: Array, half: Array) -> tuple[Array, Array]:
    return centre - half, centre + half


def _mean(summary: Summary, level: float) -> tuple[Array, Array]:
    """Mean plus or minus t standard errors, with the degrees of freedom of the error."""
    return _symmetric(summary.mean, _t(level, summary.degrees, summary.mean) * summary.standard_error)


def _normal(summary: Summary, level: float) -> tuple[Array, Array]:
    """Mean plus or minus z standard deviations of the passes."""
    return _symmetric(summary.mean, float(special.ndtri(0.5 + level / 2)) * np.sqrt(summary.epistemic))


def _student_t(summary: Summary, level: float) -> tuple[Array, Array]:
    """Where one further pass would fall, were the passes normal: mean plus or minus t s sqrt(1 + 1/T)."""
    passes = _by_row(summary.passes, summary.mean)
    half = _t(level, summary.passes - 1, summary.mean) * np.sqrt(summary.epistemic * (1 + 1 / passes))
    return _symmetric(summary.mean, half)


def _quantile(summary: Summary, level: float) -> tuple[Array, Array]:
    """Order statistics of the passes; one further pass falls between them with at least this level.

    The k-th smallest and k-th largest of T passes, k = floor((T + 1)(1 - level) / 2): needs T >= 2 / (1 - level) - 1.
    """
    # the tail is rounded before it is cut, so that 39 passes are enough at 0.95 in floating point too
    passes = int(summary.passes[0])  # kept samples mean that all rows had the same
    rank = math.floor(round((passes + 1) * (1 - level) / 2, 9))
    if rank < 1:
        needed = math.ceil(round(2 / (1 - level) - 1, 6))
        raise InputError(
            f"interval 'quantile' at level {level:g} needs at least {needed} passes, got {passes}; "
            "raise passes or choose 'student_t'"
        )
    assert summary.samples is not None, "the plan of a method that needs samples keeps them"
    ordered = np.partition(summary.samples, (rank - 1, passes - rank), axis=0)
    return ordered[rank - 1], ordered[passes - rank]


def _by_row(values: NDArray[np.int64], like: Array) -> Array:
    """One value a row (N,), shaped so that it meets (N, D)."""
    return values.astype(np.float64).reshape(-1, *(1,) * (like.ndim - 1))


def _t(level: float, degrees: NDArray[np.int64], like: Array) -> Array:
    return np.asarray(special.stdtrit(_by_row(degrees, like), 0.5 + level / 2), np.float64)


INTERVALS: dict[str, IntervalMethod] = {
    "mean": IntervalMethod(_mean, "confidence"),
    "normal": IntervalMethod(_normal, "credible"),
    "quantile": IntervalMethod(_quantile, "credible", needs_samples=True),
    "student_t": IntervalMethod(_student_t, "credible"),
}
