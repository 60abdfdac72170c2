"""Screening many rows at a stated rate, and the same with the surface that users of PyOD know."""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError
from mcdrop.fitting import fit_screen
from mcdrop.model import Model, check_fitted, check_model
from mcdrop.sampling import inputs_of, is_batches, reference_scores, scores_under
from mcdrop.screening import Screen, benjamini_hochberg, check_fdr, check_fpr, fewest_discoveries, p_values

__all__ = ["Detector", "Screened", "screen"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Screened:
    """What a screen found in N rows: ``score``, ``p_value`` and ``is_anomaly`` are (N,).

    ``controls`` is "fdr" (of the flagged rows at most a share of ``rate`` are false, on average over batches) or "fpr"
    (of exchangeable inliers at most a share of ``rate`` is flagged, on average over reference sets).
    ``smallest_p_value`` is 1 / (n + 1) with n ``reference_rows``. Where the false-discovery rate is controlled, fewer
    than ``fewest_discoveries`` anomalies among the N rows cannot be found, however strange; more reference rows help.
    """

    score: Array
    p_value: Array
    is_anomaly: NDArray[np.bool_]
    controls: str
    rate: float
    reference_rows: int
    smallest_p_value: float
    fewest_discoveries: int

    def __str__(self) -> str:
        """The finding in one sentence, for people."""
        found, rows = int(self.is_anomaly.sum()), len(self.score)
        if self.controls == "fpr":
            return f"{found} of {rows} rows flagged; of inliers at most {self.rate:g} are, on average"
        limit = (
            f"fewer than {self.fewest_discoveries} anomalies would not be found with {self.reference_rows} references"
        )
        return f"{found} of {rows} rows flagged, of which at most {self.rate:g} are false, on average; {limit}"


def screen(
    model: Model, data: Any, *, screen: Screen | None = None, fdr: float | None = None, fpr: float | None = None
) -> Screened:
    """Flags the anomalies of a whole batch, with a false-discovery rate or a false-positive rate.

    Args:
        model: what ``wrap`` or ``load`` gave.
        data: an array or tensor, a tuple or dict of inputs, or an iterable of such batches, such as a DataLoader;
            what a batch holds beyond the network's inputs (labels) is left aside.
        screen: what ``fit_screen`` gave; None is the model's own.
        fdr: the share of false flags among all flags (Benjamini-Hochberg over all rows together).
        fpr: the share of inliers that is flagged; without either rate that of the screen.

    Raises:
        InputError: no screen, both rates, a rate below what the reference rows resolve, unusable rows, or hidden
            features whose weights have changed since the screen was fitted.
    """
    check_model(model)
    screen = model.screen if screen is None else screen
    check_fitted(screen, None)
    if screen is None:
        raise InputError("screening needs a fitted screen; fit one with mcdrop.fit_screen(model, reference_rows)")
    if fdr is not None and fpr is not None:
        raise InputError("give fdr or fpr, not both: fdr bounds the false share of the flags, fpr that of the inliers")
    count = len(screen.scores)
    rate = check_fpr(screen.fpr if fpr is None else fpr, count) if fdr is None else check_fdr(fdr, count)
    reference = reference_scores(model, screen, screen.plan)
    batches = (inputs_of(model, batch) for batch in data) if is_batches(model, data) else [data]
    found = array("d")  # in one piece: an array for each batch would hold on to the memory around it
    for batch in batches:
        found.frombytes(scores_under(model, batch, screen.plan, screen.score, screen.bank).tobytes())
    if not found:
        raise InputError("the data hold no batches")
    scores = np.array(found)
    p = p_values(scores, reference)
    flagged = p <= rate if fdr is None else benjamini_hochberg(p, rate)
    fewest = 1 if fdr is None else fewest_discoveries(len(p), rate, count)
    controls = "fpr" if fdr is None else "fdr"
    return Screened(scores, p, flagged, controls, rate, count, 1 / (count + 1), fewest)


class Detector:
    """A fitted screen with PyOD's names: ``fit``, ``decision_function``, ``predict``, ``threshold_``.

    Unlike there, ``fit`` takes inliers that the network was not trained on, and the threshold keeps the promise of the
    screen: of exchangeable inliers at most ``fpr`` score above it. A score above it by rounding alone is not flagged.
    Scores and threshold follow the network's weights; ``labels_`` and ``decision_scores_`` are those of the fit.
    """

    def __init__(self, model: Model, *, fpr: float = 0.01, **options: Any) -> None:
        """Takes a model, the false-positive rate, and the options of ``fit_screen``."""
        self.model = model
        self.fpr = fpr
        self.options = options

    def fit(self, x: Any, y: object = None) -> "Detector":
        """Fits the screen on inlier rows; ``y`` is there for pipelines and not read."""
        self.screen_ = fit_screen(self.model, x, fpr=self.fpr, **self.options)
        self.decision_scores_ = self.screen_.scores
        # p-values are compared, not scores: a score that is NaN is stranger than all numbers, and larger than none
        self.labels_ = (p_values(self.decision_scores_, self.decision_scores_) <= self.screen_.fpr).astype(np.int64)
        return self

    @property
    def threshold_(self) -> float:
        """The score above which rows are flagged, under today's weights; there once ``fit`` was called."""
        ordered = np.sort(reference_scores(self.model, self.screen_, self.screen_.plan))[::-1]
        # flagged is p <= fpr: fewer than k reference scores may be as large, k = floor(fpr (n + 1))
        return float(ordered[int(np.floor(round(self.screen_.fpr * (len(ordered) + 1), 9))) - 1])

    def decision_function(self, x: Any) -> Array:
        """Gives the score of each row (N,), larger is stranger."""
        return self._scored(x)[0]

    def predict(self, x: Any) -> NDArray[np.int64]:
        """Gives 1 for anomalies and 0 for the rest, (N,)."""
        return (self.p_values(x) <= self._fitted().fpr).astype(np.int64)

    def p_values(self, x: Any) -> Array:
        """Gives conformal p-values (N,)."""
        return p_values(*self._scored(x))

    def _scored(self, x: Any) -> tuple[Array, Array]:
        """The scores of rows, and those of the reference under the same weights, which may be refused."""
        fitted = self._fitted()
        reference = reference_scores(self.model, fitted, fitted.plan)
        return scores_under(self.model, x, fitted.plan, fitted.score, fitted.bank), reference

    def __sklearn_clone__(self) -> "Detector":
        """Gives one that is not fitted, for scikit-learn's ``clone``; they share the model, which neither changes."""
        return Detector(self.model, fpr=self.fpr, **self.options)

    def __sklearn_tags__(self) -> Any:
        """Gives what scikit-learn's pipelines ask of their last step."""
        from sklearn.utils import Tags, TargetTags  # nobody else asks

        return Tags("outlier_detector", TargetTags(required=False))

    def _fitted(self) -> Screen:
        if not hasattr(self, "screen_"):
            raise InputError("this detector is not fitted; call fit with inlier rows first")
        return self.screen_
