"""Anomaly scores and conformal p-values; a larger score is stranger.

To add a score, add one function and one line to ``SCORES``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcdrop.engine import PassPlan
from mcdrop.errors import InputError, UnknownName
from mcdrop.rows import Rows
from mcdrop.summaries import Summary

__all__ = ["SCORES", "Score", "Screen", "check_fpr", "p_values", "score_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A score (N,) of a summary, and whether it needs classes."""

    of: Callable[[Summary], Array]
    needs_classes: bool = False


@dataclass(frozen=True)
class Screen:
    """A fitted screen: inlier rows with their scores under one plan, and the false-positive rate of its flags.

    The rows travel along, so the reference can be scored again with another seed or number of passes: the scores of
    reference and request then come from the same masks, and the p-values stay exact.
    """

    score: str
    rows: Rows
    scores: Array
    plan: PassPlan
    fpr: float

    def __post_init__(self) -> None:
        """Checks that the rate can be reached with this many reference rows."""
        check_fpr(self.fpr, len(self.scores))


def check_fpr(fpr: float, count: int) -> None:
    """Refuses a false-positive rate that ``count`` reference rows cannot resolve.

    Raises:
        InputError: the rate is outside (0, 1), or below the smallest p-value, 1 / (count + 1).
    """
    if isinstance(fpr, bool) or not isinstance(fpr, int | float | np.number) or not 0 < fpr < 1:
        raise InputError(f"fpr must be a number between 0 and 1, got {fpr!r}")
    if fpr < 1 / (count + 1):
        raise InputError(
            f"fpr {fpr:g} is below the smallest p-value that {count} reference rows can give, {1 / (count + 1):.2g}; "
            f"raise fpr or fit the screen on at least {int(np.ceil(1 / fpr)) - 1} rows"
        )


def score_of(name: str, summary: Summary) -> Array:
    """Gives the named score of each row, (N,).

    Raises:
        InputError: an unknown name, or a score of classes for a network without them.
    """
    if name not in SCORES:
        raise UnknownName("score", name, SCORES)
    score = SCORES[name]
    if score.needs_classes and summary.classes is None:
        fitting = sorted(known for known, other in SCORES.items() if not other.needs_classes)
        raise InputError(f"score {name!r} needs a classifier; for this task choose one of: {', '.join(fitting)}")
    return score.of(summary)


def p_values(scores: Array, reference: Array) -> Array:
    """Conformal p-values, (1 + #{reference >= score}) / (n + 1).

    Super-uniform for rows exchangeable with the reference (Bates, Candes, Lei, Romano and Sesia 2023, "Testing for
    outliers with conformal p-values", eq. 3).
    """
    at_least = len(reference) - np.searchsorted(np.sort(reference), scores, side="left")
    return np.asarray((1.0 + at_least) / (len(reference) + 1.0), np.float64)


def _per_row(values: Array) -> Array:
    """Sums everything but the rows."""
    total: Array = values.reshape(len(values), -1).sum(axis=1)
    return total


def _variance(summary: Summary) -> Array:
    """Epistemic variance, summed over the outputs."""
    return _per_row(summary.epistemic)


def _class_score(name: str) -> Callable[[Summary], Array]:
    def of(summary: Summary) -> Array:
        return _per_row(getattr(summary.classes, name))

    return of


SCORES: dict[str, Score] = {
    "entropy": Score(_class_score("entropy"), needs_classes=True),
    "mutual_information": Score(_class_score("mutual_information"), needs_classes=True),
    "variance": Score(_variance),
    "variation_ratio": Score(_class_score("variation_ratio"), needs_classes=True),
}
