"""The two halves, and what is composed of them.

``sample`` runs the passes and is costly; requests with equal plans can share it. ``interpret`` reads them and is cheap.
Library, command line, tables and service call these two: there is no second pipeline.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.audit import Audit
from mcdrop.engine import PassPlan, PassResult, run_passes
from mcdrop.errors import InputError
from mcdrop.intervals import interval_of
from mcdrop.model import Model, Options, wrap
from mcdrop.screening import Screen, check_fpr, p_values, score_of
from mcdrop.summaries import TASKS, Summary

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Prediction", "fit_screen", "interpret", "predict", "sample"]

Array = NDArray[np.float64]

_REFERENCES_KEPT = 16
_SAMPLE_BYTES = 4 * 2**30  # kept passes above this would end the process rather than help anyone


@dataclass(frozen=True)
class Prediction:
    """What the passes say about N rows. Arrays are (N, D), or (N,) where said; what is unknown is None.

    For a classifier mean, bounds and the rest speak of class probabilities. ``interval_kind`` says what the interval
    claims: "confidence" (of the mean, Monte Carlo error only) or "credible" (of the dropout posterior of the mean
    function). ``score``, ``p_value`` and ``is_anomaly`` (N,) come from a fitted screen; without one ``screen_note``
    says why they are None.
    """

    mean: Array
    variance: Array
    std: Array
    epistemic: Array
    aleatoric: Array | None
    lower: Array
    upper: Array
    standard_error: Array
    deterministic: Array
    passes: NDArray[np.int64]  # (N,)
    seed: int
    level: float
    interval: str
    interval_kind: str
    audit: Audit
    score: Array | None = None
    p_value: Array | None = None
    is_anomaly: NDArray[np.bool_] | None = None
    fpr: float | None = None
    screen_note: str | None = None
    label: NDArray[np.int64] | None = None
    entropy: Array | None = None
    expected_entropy: Array | None = None
    mutual_information: Array | None = None
    variation_ratio: Array | None = None
    samples: Array | None = None  # (T, N, D)


def sample(model: Model, x: Any, plan: PassPlan) -> PassResult:
    """Runs the passes of a plan over inputs (N, ...).

    Raises:
        InputError: unusable inputs, or kept passes that would not fit in memory.
    """
    rows = model.rows(x)
    task = TASKS[model.task]
    if plan.keep_samples:
        first = model.backend.deterministic(rows.take(slice(0, 1))).astype(np.float64)
        width = task.statistics.of(first[None]).size
        needed = plan.passes * rows.count * width * 8
        if needed > _SAMPLE_BYTES:
            raise InputError(
                f"{plan.passes} passes of {rows.count} rows need {needed / 2**30:.1f} GiB to keep every pass; "
                "give fewer rows or passes, or an interval that does not need them all, such as 'student_t'"
            )
    return run_passes(model.backend, rows, plan, statistics=task.statistics)


def interpret(
    model: Model, result: PassResult, options: Options, *, screen: Screen | None = None, fpr: float | None = None
) -> Prediction:
    """Reads passes: intervals at the asked level, and flags of the model's screen (or of the one given).

    Raises:
        InputError: too few passes for the interval, or an ``fpr`` that the screen's reference rows cannot resolve.
    """
    summary = TASKS[model.task].read(result)
    interval = interval_of(options.interval, summary, options.level)
    classes = vars(summary.classes) if summary.classes is not None else {}
    return Prediction(
        mean=summary.mean,
        variance=summary.variance,
        std=np.sqrt(summary.variance),
        epistemic=summary.epistemic,
        aleatoric=summary.aleatoric,
        lower=interval.lower,
        upper=interval.upper,
        standard_error=summary.standard_error,
        deterministic=summary.deterministic,
        passes=summary.passes,
        seed=result.plan.seed,
        level=options.level,
        interval=interval.name,
        interval_kind=interval.kind,
        audit=model.audit,
        samples=summary.samples if options.keep_samples else None,
        **_flags(model, summary, result.plan, screen, fpr),
        **classes,
    )


def _flags(model: Model, summary: Summary, plan: PassPlan, screen: Screen | None, fpr: float | None) -> dict[str, Any]:
    screen = screen or model.screen
    if screen is None:
        if fpr is not None:
            raise InputError("fpr needs a fitted screen; fit one with mcdrop.fit_screen(model, reference_rows)")
        return {"screen_note": "no screen is fitted: fit one on inlier rows with mcdrop.fit_screen"}
    if fpr is not None:
        check_fpr(fpr, len(screen.scores))
    rate = screen.fpr if fpr is None else fpr
    score = score_of(screen.score, summary)
    p = p_values(score, _reference(model, screen, plan))
    return {"score": score, "p_value": p, "is_anomaly": p <= rate, "fpr": rate}


def _reference(model: Model, screen: Screen, plan: PassPlan) -> Array:
    """The scores of the screen's rows under the plan of a request: same passes, same masks."""
    wanted = replace(plan, keep_samples=False)
    if wanted == screen.plan:
        return screen.scores
    key = (id(screen), wanted)
    with model.lock:
        known = model.references.get(key)
    if known is None:
        known = _scores(model, screen.rows, wanted, screen.score)
        with model.lock:
            while len(model.references) >= _REFERENCES_KEPT:
                model.references.pop(next(iter(model.references)))
            model.references[key] = known
    scores: Array = known
    return scores


def _scores(model: Model, x: Any, plan: PassPlan, score: str) -> Array:
    return score_of(score, TASKS[model.task].read(sample(model, x, plan)))


def predict(
    model: "Model | nn.Module",
    x: Any,
    *,
    passes: int | None = None,
    level: float | None = None,
    interval: str | None = None,
    seed: int | None = None,
    keep_samples: bool = False,
    task: str | None = None,
    screen: Screen | None = None,
    fpr: float | None = None,
) -> Prediction:
    """Gives mean, variance, interval and flags of N rows from stochastic passes.

    Args:
        model: a ``Model``, or any ``torch.nn.Module`` (which is then wrapped anew at each call, with ``x`` as example).
        x: an array or tensor, a tuple of positional inputs, or a dict of keyword inputs; first dimension: the rows.
        passes: T, also called samples or iterations; None is the model's default, as for all options (100 if unset).
        level: of the interval, between 0 and 1 (0.95).
        interval: one of ``INTERVALS`` ("student_t").
        seed: the same seed gives the same answer (0).
        keep_samples: whether to give all passes (T, N, D) too.
        task: what the module's outputs are (see ``wrap``); a ``Model`` knows its own.
        screen: a fitted screen; None is the model's own.
        fpr: false-positive rate of the flags; None is the screen's.

    Raises:
        InputError: unusable rows or options; the message says what would work.
        ModelRefused: the module has no live stochastic site, or one that cannot be controlled.
    """
    if not isinstance(model, Model):
        Options()  # nothing of a bare module's defaults to read
        options = _options(Options(), passes, level, interval, seed, keep_samples)
        model = wrap(model, example=x, task=task or "regression")
    elif task not in (None, model.task):
        raise InputError(f"this model was wrapped for {model.task}, not for {task!r}")
    else:
        options = _options(model.defaults, passes, level, interval, seed, keep_samples)
    return interpret(model, sample(model, x, options.plan), options, screen=screen, fpr=fpr)


def _options(
    defaults: Options, passes: int | None, level: float | None, interval: str | None, seed: int | None, keep: bool
) -> Options:
    return Options(
        passes=defaults.passes if passes is None else passes,
        level=defaults.level if level is None else level,
        interval=defaults.interval if interval is None else interval,
        seed=defaults.seed if seed is None else seed,
        keep_samples=keep,
    )


def fit_screen(
    model: Model,
    x_reference: Any,
    *,
    score: str = "variance",
    fpr: float = 0.01,
    passes: int | None = None,
    seed: int | None = None,
) -> Screen:
    """Fits anomaly flags on inlier rows that the network was not trained on.

    A row is flagged where its conformal p-value against these rows is at most ``fpr``: of rows exchangeable with
    them, at most this share is flagged, on average over reference sets.

    Raises:
        InputError: unusable rows, an unknown score, or too few rows for the rate.
    """
    plan = PassPlan(model.defaults.passes if passes is None else passes, model.defaults.seed if seed is None else seed)
    rows = model.rows(x_reference)
    check_fpr(fpr, rows.count)
    return Screen(score, rows, _scores(model, rows, plan, score), plan, fpr)
