"""Calibration on held-out rows: split conformal bounds and sets, and fits of noise, scale and temperature.

What conformal bounds and sets promise: of rows exchangeable with the held-out ones at least ``level`` fall inside, on
average over held-out sets and rows (Lei et al. 2018, theorem 2.2); for one held-out set of n rows the coverage follows
Beta(n + 1 - l, l), l = floor((n + 1)(1 - level)). That holds for each output on its own, not for each row, not under
drift, and not for any model or passes but those it was fitted with. Noise, scale and temperature promise nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.conformal import CONFORMAL, ConformalMethod, conformal_rank
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, InputError, UnknownName
from mcdrop.fits import fit_noise, fit_scale, fit_temperature, tempered
from mcdrop.intervals import check_level, predictive_cdf
from mcdrop.masks import is_whole
from mcdrop.rows import numbers
from mcdrop.summaries import Summary

__all__ = ["LEVELS", "Calibration", "calibration_curve", "fit_calibration", "labels_of", "targets_of"]

Array = NDArray[np.float64]

LEVELS = (0.8, 0.9, 0.95, 0.99)
DEFAULTS = {"classification": "lac", "gaussian": "standardised", "regression": "standardised"}

_SPENT_STEP = 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was fitted on ``rows`` held-out rows, and for which passes of which model.

    ``scores`` (L, n, ...) are the conformal scores in ascending order, one set for each of ``levels``, or one for all
    where ``levels`` is empty; n is less than ``rows`` where some rows were spent on ``offset``, the noise variance that
    the score is standardised with. ``noise`` (D,) is added to the epistemic variance, ``scale`` (D,) multiplies the
    predictive standard deviation, ``temperature`` divides the logarithms of the mean probabilities.
    """

    method: str
    task: str
    rows: int
    scores: Array
    plan: PassPlan
    fingerprint: str
    levels: tuple[float, ...] = ()
    offset: Array | None = None
    noise: Array | None = None
    scale: Array | None = None
    temperature: float | None = None

    @property
    def needs_samples(self) -> bool:
        """Whether the bounds need every pass."""
        return CONFORMAL[self.method].needs_samples

    def applied(self, summary: Summary) -> Summary:
        """Gives the summary with the fitted noise and scale in it."""
        aleatoric = summary.aleatoric
        if self.noise is not None:
            aleatoric = np.broadcast_to(self.noise, summary.mean.shape).copy()
        return replace(summary, aleatoric=aleatoric, scale=self.scale)

    def bounds(self, summary: Summary, level: float) -> tuple[Array, Array]:
        """Gives conformal bounds (N, D); infinite where the held-out rows are too few for the level.

        Raises:
            InputError: the calibration is of classes, was not fitted for this level, or needs passes that are not kept.
        """
        method = CONFORMAL[self.method]
        if method.bounds is None:
            raise InputError(
                f"a calibration of classes ({self.method}) gives prediction_set, not bounds; choose another interval"
            )
        if method.needs_samples and summary.samples is None:
            raise InputError(f"calibration {self.method!r} reads every pass; give keep_samples=True")
        lower, upper = method.bounds(summary, self.quantile(level), check_level(level), self.offset)
        return lower, upper

    def prediction_set(self, summary: Summary, level: float) -> NDArray[np.bool_] | None:
        """Gives for each class whether it belongs to the row's set, (N, C); None for a regression.

        Every class does where the held-out rows are too few for the level.
        """
        method = CONFORMAL[self.method]
        return None if method.members is None else method.members(summary, self.quantile(level))

    def probabilities(self, summary: Summary) -> Array | None:
        """Gives the mean class probabilities at the fitted temperature, (N, C); None for a regression."""
        return None if self.temperature is None else tempered(summary.mean, self.temperature)

    def quantile(self, level: float) -> Array:
        """Gives the score that ``level`` of future rows do not exceed, for each output; infinite if n is too small.

        Raises:
            InputError: the method's scores depend on the level, and this level was not fitted.
        """
        level = check_level(level)
        if self.levels and level not in self.levels:
            known = ", ".join(f"{one:g}" for one in self.levels)
            raise InputError(
                f"calibration {self.method!r} was fitted for the levels {known}, not for {level:g}; "
                f"fit it again with mcdrop.calibrate(..., levels=[{level:g}])"
            )
        scores = self.scores[self.levels.index(level) if self.levels else 0]
        rank = conformal_rank(len(scores), level)
        return np.full(scores.shape[1:], np.inf) if rank > len(scores) else scores[rank - 1]

    def to_dict(self) -> dict[str, Any]:
        """Gives the calibration as plain data for JSON; floats keep every digit."""
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        return {**plain, "levels": list(self.levels), "plan": asdict(self.plan), "shape": list(self.scores.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Calibration":
        """Reads what ``to_dict`` gave.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            fields = dict(data)
            fields["scores"] = scores = np.asarray(fields["scores"], np.float64).reshape(fields.pop("shape"))
            given = {name: fields[name] for name in ("offset", "noise", "scale") if fields[name] is not None}
            fields |= {name: np.asarray(value, np.float64).reshape(scores.shape[2:]) for name, value in given.items()}
            levels, plan = tuple(map(check_level, fields["levels"])), PassPlan(**fields["plan"])
            read = cls(**fields | {"levels": levels, "plan": plan})
            UnknownName.check("calibration method", read.method, CONFORMAL)
            UnknownName.check("task", read.task, DEFAULTS)
            others = [one for one in (read.offset, read.noise, read.scale, read.temperature) if one is not None]
            if not all(np.isfinite(one).all() for one in (scores, *others)) or any(np.min(one) <= 0 for one in others):
                raise ValueError("some of its numbers are not finite, or a variance, scale or temperature not above 0")
            if scores.ndim < 2 or len(scores) != max(len(levels), 1):
                raise ValueError(f"its scores have the shape {scores.shape}, for {len(levels)} levels")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"this is not a calibration: {type(error).__name__}: {error}") from error
        return read


def fit_calibration(
    summary: Summary, y: Any, *, task: str, plan: PassPlan, fingerprint: str, method: str | None = None,
    levels: Sequence[float] = LEVELS, noise: Any = None,
) -> Calibration:  # fmt: skip
    """Fits everything that held-out rows can tell.

    Args:
        summary: of the held-out rows, under the plan that will be asked.
        y: their targets (N, D), or labels (N,).
        task: of the model.
        plan: the passes.
        fingerprint: of the model under the plan.
        method: one of ``CONFORMAL``; None is the task's default.
        levels: those that a method by level is fitted for.
        noise: the noise variance of y where it is known, a number or (D,); None fits it.

    Raises:
        InputError: targets that do not belong to the rows, a row whose output is not finite, an unknown method, or one
            of another task, no level where the method needs some, or noise that is no variance of the outputs.
    """
    method = DEFAULTS[task] if method is None else method
    UnknownName.check("calibration method", method, CONFORMAL)
    entry = CONFORMAL[method]
    if (entry.members is not None) != (summary.classes is not None):
        fitting = sorted(name for name, one in CONFORMAL.items() if (one.members is None) != (entry.members is None))
        raise InputError(f"method {method!r} does not suit the task {task!r}; choose one of: {', '.join(fitting)}")
    _check_finite(summary)
    known = _known(noise, summary)
    bound: dict[str, Any] = {"method": method, "task": task, "plan": plan, "fingerprint": fingerprint}
    bound["rows"] = len(summary.mean)
    if summary.classes is not None:
        labels = labels_of(y, summary.mean)
        scores = np.sort(entry.score(summary, labels.astype(np.float64), 0.0, None), axis=0)[None]
        return Calibration(scores=scores, temperature=fit_temperature(summary.mean, labels), **bound)
    targets = targets_of(y, summary.mean)
    asked = _asked(levels) if entry.by_level else ()
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        scores, offset = _scores(entry, summary, targets, known, asked)
        if known is None and summary.aleatoric is None:
            known = fit_noise(targets - summary.mean, summary.epistemic)
        total = summary.variance if known is None else summary.epistemic + known
        scale = fit_scale(targets - summary.mean, total)
    _check_fitted(targets - summary.mean, scores, offset, known, total, scale)
    return Calibration(scores=scores, levels=asked, offset=offset, noise=known, scale=scale, **bound)


def _scores(
    entry: ConformalMethod, summary: Summary, y: Array, known: Array | None, levels: tuple[float, ...]
) -> tuple[Array, Array | None]:
    """The scores (L, n, D) in ascending order, and the noise variance in them.

    Noise that is fitted here spends every fifth row: with a noise of their own residuals in them, the other scores
    would not be exchangeable with those of future rows.
    """
    offset = known
    if entry.needs_offset and known is None and summary.aleatoric is None:
        spent = np.arange(len(y)) % _SPENT_STEP == 0
        offset = fit_noise((y - summary.mean)[spent], summary.epistemic[spent])
        summary, y = summary.take(~spent), y[~spent]
    each = [np.sort(entry.score(summary, y, level, offset), axis=0) for level in levels or (0.0,)]
    return np.stack(each), offset


def _check_finite(summary: Summary) -> None:
    """One such row would make every score, or the noise of all, NaN."""
    for values in (summary.mean, summary.variance):
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            raise InputError(
                f"the network's output for held-out row {bad.argmax()} is not finite; leave out such rows, of which "
                f"there are {bad.sum()}, or mend the network"
            )


def _check_fitted(residuals: Array, *fitted: Array | None) -> None:
    if not all(np.isfinite(values).all() for values in fitted if values is not None):
        raise InputError(
            f"targets lie up to {np.abs(residuals).max():.1e} from the network's outputs, and no finite number holds "
            "the squares that are fitted; give both in larger units"
        )


def _asked(levels: Any) -> tuple[float, ...]:
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise InputError(f"levels must be a list of levels such as [0.8, 0.9], got {levels!r}")
    asked = tuple(map(check_level, levels))
    if not asked:
        raise InputError("levels holds no level; give those that will be asked for, such as levels=[0.8, 0.9]")
    return asked


def targets_of(y: Any, mean: Array) -> Array:
    """Gives targets as numbers in the shape of the mean outputs (N, D); axes of length 1 may be more or fewer.

    Raises:
        InputError: they are of another shape, or not finite numbers.
    """
    targets = numbers(y, "targets").astype(np.float64)
    given, wanted = ([size for size in shape[1:] if size != 1] for shape in (targets.shape, mean.shape))
    if given != wanted or len(targets) != len(mean):
        raise InputError(f"targets must have the shape {mean.shape} of the outputs, got {targets.shape}")
    return targets.reshape(mean.shape)


def labels_of(y: Any, mean: Array) -> NDArray[np.int64]:
    """Gives labels (N,) as whole numbers, one for each row of mean probabilities (N, C); (N, 1) will do.

    Raises:
        InputError: they are of another shape, or name no class.
    """
    labels, shape, classes = numbers(y, "labels"), mean.shape[:-1], mean.shape[-1]
    if labels.shape == (*shape, 1):
        labels = labels[..., 0]
    if labels.shape != shape:
        raise InputError(f"labels must have the shape {shape}, one whole number a row, got {labels.shape}")
    bad = (labels != np.floor(labels)) | (labels < 0) | (labels >= classes)
    if bad.any():
        raise InputError(f"labels must be whole numbers from 0 to {classes - 1}, got {labels[bad][0]}")
    return labels.astype(np.int64)


def _known(noise: Any, summary: Summary) -> Array | None:
    if noise is None:
        return None
    if summary.classes is not None or summary.aleatoric is not None:
        why = "the network's own head gives it" if summary.classes is None else "classes have none"
        raise InputError(f"noise cannot be given here: {why}")
    single = np.isscalar(noise) or getattr(noise, "ndim", 1) == 0
    given, shape = numbers([noise] if single else noise, "noise"), summary.mean.shape[1:]
    try:
        known = np.broadcast_to(given.astype(np.float64), shape).copy()
    except ValueError:
        raise InputError(f"noise must be a number or of the shape {shape}, one row's; got {given.shape}") from None
    if isinstance(noise, bool | np.bool_) or not (known > 0).all():
        raise InputError(f"noise must be a variance above 0, got {noise}")
    return known


def calibration_curve(summary: Summary, y: Any, points: int = 99) -> tuple[Array, Array]:
    """Checks the predictive distribution: for shares p, how many y lie below their predicted p-quantile, (P,) and (P,).

    On the diagonal the model is calibrated; the second array is the map that the recalibration of Kuleshov, Fenner and
    Ermon (2018, algorithm 1) would fit, and its mean squared distance from the first their calibration error.

    Raises:
        InputError: no whole number of points, or the noise is not known; apply a calibration to the summary first.
    """
    if not is_whole(points) or points < 1:
        raise InputError(f"points must be a whole number of at least 1, got {points!r}")
    share = np.sort(predictive_cdf(summary, targets_of(y, summary.mean)).ravel())
    expected = np.arange(1, points + 1) / (points + 1)
    return expected, np.searchsorted(share, expected, side="right") / len(share)
