"""Anomaly scores, conformal p-values and the rates they control; a larger score is stranger.

To add a score, add one function and one line to ``SCORES``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcdrop.bank import Bank
from mcdrop.engine import ROUNDING, PassPlan, plain
from mcdrop.errors import InputError, UnknownName
from mcdrop.rows import Rows
from mcdrop.summaries import Summary

__all__ = [
    "SCORES",
    "Evidence",
    "Score",
    "Screen",
    "benjamini_hochberg",
    "check_fdr",
    "check_fpr",
    "fewest_discoveries",
    "p_values",
    "parts_of",
    "score_of",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What a score may read about N rows: their summary, and how far their hidden features lie from a bank's (N,)."""

    summary: Summary | None
    distance: Array | None = None
    bank: Bank | None = None


@dataclass(frozen=True)
class Score:
    """A score (N,), and what it needs: classes, stochastic passes, or hidden features and a bank of typical rows."""

    of: Callable[[Evidence], Array]
    needs_classes: bool = False
    needs_passes: bool = True
    needs_features: bool = False


@dataclass(frozen=True, eq=False)
class Screen:
    """A fitted screen: inlier rows with their scores under one plan, and the false-positive rate of its flags.

    The rows travel along, so the reference can be scored again with another seed or number of passes: the scores of
    reference and request then come from the same masks, and the p-values stay exact. ``weights`` is the digest of the
    model that the scores belong to: with other weights or another output the rows are scored again too. ``bank`` holds
    other typical rows for the scores that read hidden features.
    """

    score: str
    rows: Rows
    scores: Array
    plan: PassPlan
    fpr: float
    bank: Bank | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        """Checks that the rate can be reached with this many reference rows."""
        object.__setattr__(self, "fpr", check_fpr(self.fpr, len(self.scores)))


def check_fpr(fpr: float, count: int) -> float:
    """Gives a false-positive rate as a plain number, if ``count`` reference rows can resolve it.

    Raises:
        InputError: the rate is outside (0, 1), or below the smallest p-value, 1 / (count + 1).
    """
    return _check_rate("fpr", fpr, count)


def check_fdr(fdr: float, count: int) -> float:
    """Gives a false-discovery rate as a plain number, if a batch of anomalies alone could be flagged at it.

    Raises:
        InputError: the rate is outside (0, 1), or below 1 / (count + 1).
    """
    return _check_rate("fdr", fdr, count)


def _check_rate(name: str, rate: float, count: int) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate < 1:
        raise InputError(f"{name} must be a number between 0 and 1, got {rate!r}")
    rate = plain(rate)
    if rate < 1 / (count + 1):
        raise InputError(
            f"{name} {rate:g} is below the smallest p-value that {count} reference rows can give, "
            f"{1 / (count + 1):.2g}; raise {name} or fit the screen on at least {math.ceil(1 / rate) - 1} rows"
        )
    return rate


def score_of(
    name: str, summary: Summary | None, *, features: NDArray[np.float32] | None = None, bank: Bank | None = None
) -> Array:
    """Gives the named score of each row, (N,); ``features`` (N, F) and a ``bank`` for the scores that read them.

    Raises:
        InputError: an unknown name, or a score of classes for a network without them.
    """
    if name not in SCORES:
        raise UnknownName("score", name, SCORES)
    score = SCORES[name]
    if score.needs_classes and (summary is None or summary.classes is None):
        fitting = sorted(known for known, other in SCORES.items() if not other.needs_classes)
        raise InputError(f"score {name!r} needs a classifier; for this task choose one of: {', '.join(fitting)}")
    if score.needs_features and (features is None or bank is None):
        raise InputError(f"score {name!r} reads hidden features, which only a fitted screen compares; use fit_screen")
    distance = bank.measure(features) if bank is not None and features is not None else None
    return score.of(Evidence(summary, distance, bank))


def p_values(scores: Array, reference: Array) -> Array:
    """Conformal p-values, (1 + #{reference >= score}) / (n + 1); equal scores count as at least as strange.

    Super-uniform for rows exchangeable with the reference, ties or not (Bates, Candes, Lei, Romano and Sesia 2023,
    "Testing for outliers with conformal p-values", eq. 3). The last digits of a score depend on the batch that its row
    comes in, so what is below it by rounding alone counts as equal: that can only make a p-value larger.
    """
    at_least = len(reference) - np.searchsorted(np.sort(reference), _but_for_rounding(scores), side="left")
    return np.asarray((1.0 + at_least) / (len(reference) + 1.0), np.float64)


def _but_for_rounding(scores: Array) -> Array:
    """The smallest that equal scores may be; what is infinite or NaN stays so."""
    return np.subtract(scores, ROUNDING * np.abs(scores), out=scores.copy(), where=np.isfinite(scores))


def benjamini_hochberg(p: Array, fdr: float) -> NDArray[np.bool_]:
    """Flags the R smallest p-values (N,), R the largest with p_(R) <= fdr R / N (Benjamini and Hochberg 1995).

    Of the flagged rows at most a share of ``fdr`` are false, on average over batches: conformal p-values that share
    their reference are positively dependent in the way that this needs (Bates et al. 2023, theorem 2).

    >>> benjamini_hochberg(np.array([0.01, 0.5, 0.04, 0.9]), 0.1).tolist()
    [True, False, True, False]
    """
    ordered = np.sort(p)
    # a hair of slack, so that 0.1 * 3 / 3 does not fall below 0.1
    below = np.flatnonzero(ordered <= fdr * np.arange(1, len(p) + 1) / max(len(p), 1) * (1 + 1e-12))
    if not len(below):
        return np.zeros(len(p), np.bool_)
    flagged: NDArray[np.bool_] = p <= ordered[below[-1]]
    return flagged


def fewest_discoveries(rows: int, fdr: float, count: int) -> int:
    """Gives the fewest rows that Benjamini-Hochberg can flag among ``rows``: N / (fdr (n + 1)) with n reference rows.

    Fewer anomalies than that are never found, however strange; more reference rows lower the limit.
    """
    return max(1, math.ceil(round(rows / (fdr * (count + 1)), 9)))


def _per_row(values: Array) -> Array:
    """Sums everything but the rows."""
    total: Array = values.reshape(len(values), -1).sum(axis=1)
    return total


def _summary(evidence: Evidence) -> Summary:
    assert evidence.summary is not None, "scores that need passes get a summary"
    return evidence.summary


def _variance(evidence: Evidence) -> Array:
    """Epistemic variance, summed over the outputs."""
    return _per_row(_summary(evidence).epistemic)


def _total_variance(evidence: Evidence) -> Array:
    """Variance of y, summed over the outputs: epistemic plus what a head reports; for classes 1 - sum p^2."""
    summary = _summary(evidence)
    return _per_row(summary.variance if summary.classes is None else summary.mean * (1 - summary.mean))


def _class_score(name: str) -> Callable[[Evidence], Array]:
    def of(evidence: Evidence) -> Array:
        return _per_row(getattr(_summary(evidence).classes, name))

    return of


def _feature_distance(evidence: Evidence) -> Array:
    """How far the hidden features lie from those of typical rows."""
    assert evidence.distance is not None
    return evidence.distance


def parts_of(evidence: Evidence) -> dict[str, Array]:
    """Gives the parts of the combined score (N,): feature distance, and entropy, or variance where are no classes."""
    spread = "variance" if _summary(evidence).classes is None else "entropy"
    return {name: SCORES[name].of(evidence) for name in (spread, "feature_distance")}


def _combined(evidence: Evidence) -> Array:
    """The stranger of two looks, spread of the passes and distance of features: Tippett's smallest p-value (1931).

    The p-values are against typical rows that are neither in the bank nor in the reference.
    """
    assert evidence.bank is not None
    looks = [_surprise(values, evidence.bank.typical[name]) for name, values in parts_of(evidence).items()]
    return np.asarray(np.maximum.reduce(looks), np.float64)


def _surprise(values: Array, typical: Array) -> Array:
    """Minus the logarithm of the share of typical values (ascending) that are as large.

    The largest tenth follows a fitted exponential tail, so that values beyond the largest are still told apart. A NaN
    stays one: it is stranger than all numbers, and larger than none.
    """
    start, least = typical[int(0.9 * len(typical))], _but_for_rounding(values)
    slope = max(float((typical[typical >= start] - start).mean()), float(np.finfo(np.float64).tiny))
    share = (1 + len(typical) - np.searchsorted(typical, least, side="left")) / (len(typical) + 1)
    with np.errstate(over="ignore"):  # a tail of one value has no spread: all beyond it is infinitely strange
        beyond = np.maximum(least - start, 0) / slope - math.log(0.1)
    found = np.where(least > start, beyond, np.minimum(-np.log(share), -math.log(0.1)))
    return np.where(np.isnan(values), np.nan, found)


SCORES: dict[str, Score] = {
    "combined": Score(_combined, needs_features=True),
    "entropy": Score(_class_score("entropy"), needs_classes=True),
    "feature_distance": Score(_feature_distance, needs_passes=False, needs_features=True),
    "mutual_information": Score(_class_score("mutual_information"), needs_classes=True),
    "total_variance": Score(_total_variance),
    "variance": Score(_variance),
    "variation_ratio": Score(_class_score("variation_ratio"), needs_classes=True),
}
