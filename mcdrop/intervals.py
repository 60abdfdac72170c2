"""Intervals, and what each may claim.

``confidence``: with endless passes the mean would lie here; Monte Carlo error only. ``credible``: the dropout posterior
of the mean function; epistemic, no promise about y. ``prediction``: a future y; ``predictive`` if the noise model is
right, ``conformal`` for at least ``level`` of the rows exchangeable with those of its calibration, on average over
calibrations and rows. To add a method, add one function and one line to ``INTERVALS``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mcdrop.engine import plain
from mcdrop.errors import InputError, UnknownName
from mcdrop.summaries import Summary

__all__ = [
    "INTERVALS",
    "Calibrated",
    "Interval",
    "IntervalMethod",
    "check_level",
    "interval_of",
    "predictive_bounds",
    "predictive_cdf",
]

Array = NDArray[np.float64]

_BLOCK = 2**22  # entries of the passes that are ordered, or a mixture is solved for, at a time
_STEPS = 100
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Interval:
    """Bounds (N, D) at a level, with the method's name and the kind of its claim."""

    lower: Array
    upper: Array
    level: float
    name: str
    kind: str


class Calibrated(Protocol):
    """What was fitted on held-out rows and gives bounds that hold for future y."""

    def bounds(self, summary: Summary, level: float) -> tuple[Array, Array]:
        """Gives bounds (N, D) at a level."""


@dataclass(frozen=True)
class IntervalMethod:
    """A method: bounds of a summary at a level, the kind of its claim, and what it needs.

    With ``needs_calibration`` the bounds take a calibration (or None) as third argument.
    """

    bounds: Callable[..., tuple[Array, Array]]
    kind: str
    needs_samples: bool = False
    needs_calibration: bool = False


def check_level(level: float) -> float:
    """Gives the level as a plain number, if it lies between 0 and 1.

    Raises:
        InputError: it does not; 95 is meant as 0.95.
    """
    if isinstance(level, bool) or not isinstance(level, int | float | np.number) or not 0 < level < 1:
        meant = isinstance(level, int | float) and 1 < level < 100
        hint = f" (for {level:g} % give {level / 100:g})" if meant else ""
        raise InputError(f"level must be a number between 0 and 1, got {level!r}{hint}")
    return plain(level)


def interval_of(name: str, summary: Summary, level: float, calibration: Calibrated | None = None) -> Interval:
    """Gives the named interval of a summary, kept inside the support of the mean function.

    Raises:
        InputError: an unknown name, too few passes for the method at this level, or no calibration where one is needed.
    """
    UnknownName.check("interval", name, INTERVALS)
    method = INTERVALS[name]
    lower, upper = method.bounds(summary, level, *([calibration] if method.needs_calibration else []))
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
    That level is exact for independent passes; balanced ones cover the distribution more evenly, so it holds nearly.
    """
    if summary.samples is None:
        raise InputError(
            "interval 'quantile' reads every pass, and these passes were not kept; sample them with keep_samples=True "
            "or choose 'student_t'"
        )
    # the tail is rounded before it is cut, so that 39 passes are enough at 0.95 in floating point too
    passes = int(summary.passes[0])  # kept samples mean that all rows had the same
    rank = math.floor(round((passes + 1) * (1 - level) / 2, 9))
    if rank < 1:
        needed = math.ceil(round(2 / (1 - level) - 1, 6))
        raise InputError(
            f"interval 'quantile' at level {level:g} needs at least {needed} passes, got {passes}; "
            "raise passes or choose 'student_t'"
        )
    samples = summary.samples.reshape(passes, -1)
    lower, upper = np.empty(samples.shape[1]), np.empty(samples.shape[1])
    for part in _blocks(samples):
        columns = np.ascontiguousarray(samples[:, part].T)
        columns.partition((rank - 1, passes - rank), axis=1)
        lower[part], upper[part] = columns[:, rank - 1], columns[:, passes - rank]
    return lower.reshape(summary.mean.shape), upper.reshape(summary.mean.shape)


def _blocks(samples: NDArray[np.floating[Any]]) -> Iterator[slice]:
    """Walks over the columns of passes (T, C), so many at a time that what is made of them stays small."""
    size = max(1, _BLOCK // len(samples))
    yield from (slice(start, start + size) for start in range(0, samples.shape[1], size))


def _conformal(summary: Summary, level: float, calibration: Calibrated | None) -> tuple[Array, Array]:
    """Bounds of split conformal prediction; infinite where the held-out rows are too few for the level."""
    if calibration is None:
        raise InputError(
            "interval 'conformal' needs a calibration; fit one on held-out rows with "
            "mcdrop.calibrate(model, x_held, y_held)"
        )
    return calibration.bounds(summary, level)


def predictive_bounds(summary: Summary, level: float) -> tuple[Array, Array]:
    """Quantiles of y: solves (1/T) sum Phi((u - f_t) / sigma_t) = tail where the passes are kept.

    Otherwise y is taken as normal with the total variance, epistemic plus noise (Kendall and Gal 2017, eq. 9).

    Raises:
        InputError: no noise is known, or the rows are classes.
    """
    tail = (1 - level) / 2
    noise = _noise(summary)
    if summary.samples is None:
        half = -float(special.ndtri(tail)) * np.sqrt(summary.variance) * _scale(summary)
        return _symmetric(summary.mean, half)
    shape = summary.mean.shape
    samples = summary.samples.reshape(len(summary.samples), -1)
    spread = np.sqrt(np.maximum(noise, _TINY)).astype(np.float64).reshape(len(noise), -1)
    lower, upper = np.empty(samples.shape[1]), np.empty(samples.shape[1])
    for part in _blocks(samples):
        centres = samples[:, part].astype(np.float64)
        lower[part] = _mixture_quantile(centres, spread[:, part], tail)
        upper[part] = _mixture_quantile(centres, spread[:, part], 1 - tail)
    scale = _scale(summary)
    bounds = [summary.mean + scale * (bound.reshape(shape) - summary.mean) for bound in (lower, upper)]
    return bounds[0], bounds[1]


def predictive_cdf(summary: Summary, y: Array) -> Array:
    """Gives the probability that the predictive distribution of each row puts below y, both (N, D).

    Raises:
        InputError: no noise is known, or the rows are classes.
    """
    noise = _noise(summary)
    at = summary.mean + (y - summary.mean) / _scale(summary)
    if summary.samples is None:
        return np.asarray(special.ndtr((at - summary.mean) / np.sqrt(summary.variance)), np.float64)
    return np.asarray(special.ndtr((at - summary.samples) / np.sqrt(np.maximum(noise, _TINY))).mean(axis=0), np.float64)


def _noise(summary: Summary) -> Array:
    """The noise variance of each pass, (T, N, D) or (1, N, D)."""
    if summary.classes is not None:
        raise InputError(
            "interval 'predictive' is about numbers, not classes; calibrate the model and read prediction_set"
        )
    if summary.aleatoric is None:
        raise InputError(
            "interval 'predictive' needs to know the noise of y: give a network with a log-variance head "
            "(task='gaussian'), or fit the noise on held-out rows with mcdrop.calibrate(model, x_held, y_held)"
        )
    return summary.aleatoric[None] if summary.log_noise is None else np.exp(summary.log_noise, dtype=np.float64)


def _scale(summary: Summary) -> Array | float:
    return 1.0 if summary.scale is None else summary.scale


def _mixture_quantile(centres: Array, spread: Array, share: float) -> Array:
    """Newton's method inside a bracket, the components' own quantiles, between which that of an even mixture lies.

    Every third step halves the bracket, so that a flat place cannot hold it up. Gives (M,) from (T, M).
    """
    own = centres + spread * float(special.ndtri(share))
    low, high = own.min(axis=0), own.max(axis=0)
    found, left = (low + high) / 2, np.arange(centres.shape[1])
    for step in range(_STEPS):
        at = found[left]
        z = (at - centres[:, left]) / spread[:, left]
        excess = special.ndtr(z).mean(axis=0) - share
        low, high = np.where(excess < 0, at, low), np.where(excess < 0, high, at)
        density = (np.exp(-(z**2) / 2) / spread[:, left]).mean(axis=0) / math.sqrt(2 * math.pi)
        newton = at - np.divide(excess, density, out=np.full_like(at, np.inf), where=density > _TINY)
        inside = (low < newton) & (newton < high) & (step % 3 < 2)
        unsolved = (np.abs(excess) > 1e-12) & (high - low > 1e-15 * np.abs(at))
        if not unsolved.any():
            break
        left, low, high = left[unsolved], low[unsolved], high[unsolved]
        found[left] = np.where(inside[unsolved], newton[unsolved], (low + high) / 2)
    return np.asarray(found, np.float64)


def _by_row(values: NDArray[np.int64], like: Array) -> Array:
    """One value a row (N,), shaped so that it meets (N, D)."""
    return values.astype(np.float64).reshape(-1, *(1,) * (like.ndim - 1))


def _t(level: float, degrees: NDArray[np.int64], like: Array) -> Array:
    return np.asarray(special.stdtrit(_by_row(degrees, like), 0.5 + level / 2), np.float64)


INTERVALS: dict[str, IntervalMethod] = {
    "conformal": IntervalMethod(_conformal, "prediction", needs_calibration=True),
    "mean": IntervalMethod(_mean, "confidence"),
    "normal": IntervalMethod(_normal, "credible"),
    "predictive": IntervalMethod(predictive_bounds, "prediction"),
    "quantile": IntervalMethod(_quantile, "credible", needs_samples=True),
    "student_t": IntervalMethod(_student_t, "credible"),
}
