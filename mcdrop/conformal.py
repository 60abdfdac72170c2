"""Split conformal prediction: each score of a held-out row together with its inverse, as one entry of ``CONFORMAL``.

Scores are larger the worse y fits. With q the ceil((n + 1) level)-th smallest of n held-out scores, all y whose score
is at most q cover at least ``level`` of exchangeable rows (Vovk, Gammerman and Shafer 2005). To add a method, add one
score, its inverse and one line to ``CONFORMAL``.

The last digits of an output depend on the batch that its row comes in. Where many scores are equal, as of rows that
repeat, rounding would decide about all of them at once, so an inverse takes in what is above q by rounding alone: that
can only cover more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mcdrop.engine import ROUNDING
from mcdrop.errors import InputError
from mcdrop.intervals import predictive_bounds
from mcdrop.summaries import Summary

__all__ = ["CONFORMAL", "ConformalMethod", "conformal_rank"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Bounds = tuple[Array, Array]

# The fixed penalty that Angelopoulos et al. 2021 ship: 0.01 for each class beyond the fifth.
_PENALTY, _UNPENALISED = 0.01, 5

_DIGITS = 4  # so many units of its last digit may a number be off
_LEAST = 1e-9  # of a score of classes: what it is made of is up to 1, and is rounded even where the score is 0


@dataclass(frozen=True)
class ConformalMethod:
    """A score of held-out rows and its inverse: ``bounds`` for numbers, ``members`` for classes.

    ``score(summary, y, level, offset)`` gives (N, D); ``bounds(summary, q, level, offset)`` and ``members(summary, q)``
    give what has a score of at most q (D,). ``offset`` (D,) is a noise variance that was fitted on other rows, or None
    where the network gives its own; ``needs_offset`` asks for it. With ``by_level`` the scores depend on the level.
    """

    score: Callable[[Summary, Array, float, Array | None], Array]
    bounds: Callable[[Summary, Array, float, Array | None], Bounds] | None = None
    members: Callable[[Summary, Array], NDArray[np.bool_]] | None = None
    needs_offset: bool = False
    needs_samples: bool = False
    by_level: bool = False


def conformal_rank(count: int, level: float) -> int:
    """Gives k = ceil((n + 1) level): the k-th smallest of n scores covers; above n only an infinite bound does.

    >>> conformal_rank(19, 0.95), conformal_rank(18, 0.95)
    (19, 19)
    """
    # rounded first, so that 20 * 0.95 is 19 in floating point too; a tiny level is not rounded away
    return max(1, math.ceil(round((count + 1) * level, 9)))


def _slack(summary: Summary, width: Array, far: Array) -> Array:
    """How far rounding moves a bound: relative to its width, and by last digits of what the network gave.

    What is infinite, as an output that overflowed, is not moved: with a slack of its own it would be NaN.
    """
    width, far = (np.where(np.isfinite(size), size, 0) for size in (width, far))
    if summary.deterministic is None:
        raise InputError(
            "bounds from a calibration read the digits of the deterministic output, which was left out; sample with "
            "deterministic=True"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold
        single = summary.deterministic == summary.deterministic.astype(np.float32)
    unit: Array = np.where(single, np.finfo(np.float32).eps, np.finfo(np.float64).eps)
    return ROUNDING * width + _DIGITS * unit * np.abs(far)


def _around_mean(summary: Summary, half: Array) -> Bounds:
    half = half + _slack(summary, half, summary.mean)
    return summary.mean - half, summary.mean + half


def _absolute(summary: Summary, y: Array, level: float, offset: Array | None) -> Array:
    """Distance from the mean."""
    return np.abs(y - summary.mean)


def _absolute_bounds(summary: Summary, q: Array, level: float, offset: Array | None) -> Bounds:
    return _around_mean(summary, q)


def _unit(summary: Summary, offset: Array | None) -> Array:
    """Standard deviation of y: the passes' variance alone is too noisy to divide by, so noise is added."""
    return np.sqrt(summary.variance if offset is None else summary.epistemic + offset)


def _standardised(summary: Summary, y: Array, level: float, offset: Array | None) -> Array:
    """Distance from the mean in predictive standard deviations (Lei et al. 2018, section 5.2)."""
    return np.abs(y - summary.mean) / _unit(summary, offset)


def _standardised_bounds(summary: Summary, q: Array, level: float, offset: Array | None) -> Bounds:
    return _around_mean(summary, q * _unit(summary, offset))


def _quantiles(summary: Summary, level: float, offset: Array | None) -> Bounds:
    """Quantiles of the predictive mixture, with the noise that the scores were fitted with."""
    noise = summary.aleatoric if offset is None else np.broadcast_to(offset, summary.mean.shape)
    return predictive_bounds(replace(summary, aleatoric=noise, scale=None), level)


def _cqr(summary: Summary, y: Array, level: float, offset: Array | None) -> Array:
    """How far y lies outside its quantiles, negative inside (Romano, Patterson and Candes 2019, eq. 6)."""
    lower, upper = _quantiles(summary, level, offset)
    return np.maximum(lower - y, y - upper)


def _cqr_bounds(summary: Summary, q: Array, level: float, offset: Array | None) -> Bounds:
    lower, upper = _quantiles(summary, level, offset)
    q = q + _slack(summary, np.maximum(np.abs(q), upper - lower), np.maximum(np.abs(lower), np.abs(upper)))
    crossed = lower - q > upper + q  # a q far below zero: no y scores that low, and the interval is a point
    middle = (lower + upper) / 2
    return np.where(crossed, middle, lower - q), np.where(crossed, middle, upper + q)


def _of_label(scores: Array, labels: Array) -> Array:
    """The score of the true class of each row."""
    taken: Array = np.take_along_axis(scores, labels.astype(np.int64)[..., None], axis=-1)[..., 0]
    return taken


def _lac_scores(summary: Summary) -> Array:
    """Improbability of each class (Sadinle, Lei and Wasserman 2019): the smallest sets, which may be empty."""
    return 1 - summary.mean


def _aps_scores(summary: Summary) -> Array:
    """Probability of the classes that are at least as probable (Romano, Sesia and Candes 2020), not randomised."""
    order = np.argsort(-summary.mean, axis=-1, kind="stable")
    total = np.cumsum(np.take_along_axis(summary.mean, order, axis=-1), axis=-1)
    scores = np.empty_like(total)
    np.put_along_axis(scores, order, total, axis=-1)
    return scores


def _raps_scores(summary: Summary) -> Array:
    """APS with a penalty for long sets (Angelopoulos, Bates, Malik and Jordan 2021, eq. 4)."""
    rank = np.argsort(np.argsort(-summary.mean, axis=-1, kind="stable"), axis=-1, kind="stable") + 1
    return _aps_scores(summary) + _PENALTY * np.maximum(0, rank - _UNPENALISED)


def _sets(scores: Callable[[Summary], Array], *, never_empty: bool) -> ConformalMethod:
    """A method of classes; with ``never_empty`` the most probable class is always in, which can only cover more."""

    def score(summary: Summary, y: Array, level: float, offset: Array | None) -> Array:
        return _of_label(scores(summary), y)

    def members(summary: Summary, q: Array) -> NDArray[np.bool_]:
        most = (q + ROUNDING * np.maximum(np.abs(q), _LEAST))[..., None]
        inside: NDArray[np.bool_] = ~(scores(summary) > most)  # and every class where scores are NaN: nothing is known
        if never_empty:
            np.put_along_axis(inside, summary.mean.argmax(axis=-1)[..., None], True, axis=-1)
        return inside

    return ConformalMethod(score, members=members)


CONFORMAL: dict[str, ConformalMethod] = {
    "absolute": ConformalMethod(_absolute, _absolute_bounds),
    "aps": _sets(_aps_scores, never_empty=True),
    "cqr": ConformalMethod(_cqr, _cqr_bounds, needs_offset=True, needs_samples=True, by_level=True),
    "lac": _sets(_lac_scores, never_empty=False),
    "raps": _sets(_raps_scores, never_empty=True),
    "standardised": ConformalMethod(_standardised, _standardised_bounds, needs_offset=True),
}
