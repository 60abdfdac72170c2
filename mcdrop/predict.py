"""The two halves composed: ``sample`` runs the passes and is costly, ``interpret`` reads them and is cheap.

Requests with equal plans can share passes. Library, command line, tables and service call these two: there is no second
pipeline.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.audit import Audit
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan, PassResult
from mcdrop.errors import InputError
from mcdrop.intervals import INTERVALS, interval_of
from mcdrop.model import Model, Options, check_fitted, check_model
from mcdrop.sampling import fingerprint, reference_scores, sample
from mcdrop.screening import Screen, check_fpr, p_values, score_of
from mcdrop.summaries import TASKS, Summary
from mcdrop.wrapping import wrap

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Prediction", "in_words", "interpret", "predict"]

Array = NDArray[np.float64]

_MAX_PASSES = 2000


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the passes say about N rows. Arrays are (N, D), or (N,) where said; what is unknown is None.

    For a classifier mean, bounds and the rest speak of class probabilities. ``interval_kind`` says what the interval
    claims: "confidence" (of the mean, Monte Carlo error only), "credible" (of the dropout posterior of the mean
    function) or "prediction" (of a future y). With a calibration of classes ``prediction_set`` says which classes hold
    the true one with probability ``level``, and ``probabilities`` are the means at the fitted temperature. ``score``,
    ``p_value`` and ``is_anomaly`` (N,) come from a fitted screen; without one ``screen_note`` says why they are None.
    """

    mean: Array
    variance: Array
    std: Array
    epistemic: Array
    aleatoric: Array | None
    lower: Array
    upper: Array
    standard_error: Array
    deterministic: Array | None
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
    samples: NDArray[np.floating[Any]] | None = None  # (T, N, D)
    prediction_set: NDArray[np.bool_] | None = None
    probabilities: Array | None = None


def interpret(
    model: Model, result: PassResult, options: Options, *, screen: Screen | None = None, fpr: float | None = None,
    calibration: Calibration | None = None,
) -> Prediction:  # fmt: skip
    """Reads passes: intervals at the asked level, and what the model's calibration and screen (or those given) add.

    Raises:
        InputError: passes of another task, too few or not kept for the interval or the options, without the hidden
            features that the screen compares, a calibration of another model or plan, or an ``fpr`` that the screen's
            reference rows cannot resolve.
    """
    check_model(model)
    check_fitted(screen, calibration)
    summary = _summary(model, result, options)
    flags = _flags(model, summary, result, screen, fpr)
    calibration = _binding(model, result.plan, options, calibration)
    if calibration is not None:
        summary = calibration.applied(summary)
    interval = interval_of(options.interval, summary, options.level, calibration)
    bound = calibration is not None
    classes = vars(summary.classes) if summary.classes is not None else {}
    if calibration is not None and summary.classes is not None:
        classes = classes | {
            "prediction_set": calibration.prediction_set(summary, options.level),
            "probabilities": calibration.probabilities(summary),
        }
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
        audit=model.audit if model.audit.calibrated == bound else replace(model.audit, calibrated=bound),
        samples=summary.samples if options.keep_samples else None,
        **flags,
        **classes,
    )


def _summary(model: Model, result: PassResult, options: Options) -> Summary:
    """Reads the passes, which must be those of a model for the same task, and kept where they are asked for."""
    if not isinstance(result, PassResult):
        raise InputError(f"result must be what mcdrop.sample gave, got {type(result).__name__}")
    if not isinstance(options, Options):
        raise InputError(f"options must be mcdrop.Options(...), got {options!r}")
    task = TASKS[model.task]
    if result.statistics not in (None, task.statistics):
        made = next((name for name, one in TASKS.items() if one.statistics == result.statistics), "another task")
        raise InputError(f"these passes are of a model for {made} and cannot be read as {model.task}")
    if options.keep_samples and result.samples is None:
        raise InputError(
            "options ask for every pass, and these passes were not kept; sample them with keep_samples=True, or leave "
            "it out of the options"
        )
    return task.read(result)


def _binding(model: Model, plan: PassPlan, options: Options, given: Calibration | None) -> Calibration | None:
    """The calibration that holds for a plan: the given one must, the model's own is left out where it does not."""
    calibration = given or model.calibration
    if calibration is None:
        return None
    fitted, asked = replace(calibration.plan, keep_samples=False), replace(plan, keep_samples=False)
    if fitted == asked and fingerprint(model, plan) == calibration.fingerprint:
        return calibration
    if given is None and INTERVALS[options.interval].kind != "prediction":
        return None
    if fitted != asked:
        raise InputError(
            f"the calibration was fitted with {in_words(fitted)} and does not hold for {in_words(asked)}; "
            "ask for the same passes, or calibrate again"
        )
    raise InputError(
        "the calibration belongs to another model or output, or the weights or live sites have changed since; "
        "calibrate again"
    )


def in_words(plan: PassPlan) -> str:
    """Says what a calibration is bound to of a plan, as options are written."""
    said = f"passes={plan.passes} seed={plan.seed} sampler={plan.sampler}"
    said += " exact_last=True" if plan.exact_last else ""
    return said if plan.tolerance is None else f"{said} tolerance={plan.tolerance:g}"


def _flags(
    model: Model, summary: Summary, result: PassResult, screen: Screen | None, fpr: float | None
) -> dict[str, Any]:
    screen = screen or model.screen
    if screen is None:
        if fpr is not None:
            raise InputError("fpr needs a fitted screen; fit one with mcdrop.fit_screen(model, reference_rows)")
        return {"screen_note": "no screen is fitted: fit one on inlier rows with mcdrop.fit_screen"}
    rate = screen.fpr if fpr is None else check_fpr(fpr, len(screen.scores))
    bank = screen.bank
    if bank is not None and (result.features is None or result.layer != bank.layer):
        raise InputError(
            "the screen compares hidden features that were not read with these passes; give it to mcdrop.sample too: "
            "mcdrop.sample(model, x, plan, screen=screen)"
        )
    score = score_of(screen.score, summary, features=result.features, bank=bank)
    p = p_values(score, reference_scores(model, screen, result.plan))
    return {"score": score, "p_value": p, "is_anomaly": p <= rate, "fpr": rate}


def predict(
    model: "Model | nn.Module",
    x: Any,
    *,
    passes: int | None = None,
    level: float | None = None,
    interval: str | None = None,
    seed: int | None = None,
    keep_samples: bool | None = None,
    tolerance: float | None = None,
    max_passes: int | None = None,
    sampler: str | None = None,
    exact_last: bool | None = None,
    deterministic: bool = True,
    task: str | None = None,
    screen: Screen | None = None,
    fpr: float | None = None,
    calibration: Calibration | None = None,
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
        tolerance: end each row as soon as the standard error of its mean is at most this, for every output; the error
            is looked at every 64 passes, and the answer after T passes is the one that T passes always give. Goes with
            ``max_passes``, not with ``passes``.
        max_passes: where a row with a tolerance, given or the model's default, ends at the latest (2000).
        sampler: "balanced" (default) or "iid" passes.
        exact_last: whether the last dropout is averaged over in closed form, where its output goes through a linear
            layer to a regression's output: the same mean and variance with less Monte Carlo error (see ``exact``).
        deterministic: whether the output with every draw off is given too, which takes about one pass more; a
            calibration needs it.
        task: what the module's outputs are (see ``wrap``); a ``Model`` knows its own.
        screen: a fitted screen; None is the model's own.
        fpr: false-positive rate of the flags; None is the screen's.
        calibration: what ``calibrate`` gave; None is the model's own. Where one is given, passes and seed left out are
            those it was fitted with, and the interval left out is "conformal" (for classes: sets, beside the interval).

    Raises:
        InputError: unusable rows or options; the message says what would work.
        ModelRefused: the module has no live stochastic site, or one that cannot be controlled.
    """
    if isinstance(model, Model) and task not in (None, model.task):
        raise InputError(f"this model was wrapped for {model.task}, not for {task!r}")
    check_fitted(screen, calibration)
    defaults = model.defaults if isinstance(model, Model) else Options()
    if calibration is not None:
        defaults = _bound(defaults, calibration)
    passes = _most_passes(passes, tolerance, max_passes, usual=defaults.tolerance)
    keep_samples = keep_samples or (False if tolerance or exact_last else keep_samples)  # no default goes with these
    asked: dict[str, Any] = {
        "passes": passes, "level": level, "interval": interval, "seed": seed, "tolerance": tolerance,
        "sampler": sampler, "keep_samples": keep_samples, "exact_last": exact_last,
    }  # fmt: skip
    options = replace(defaults, **{name: value for name, value in asked.items() if value is not None})
    if not isinstance(model, Model):
        model = wrap(model, example=x, task="regression" if task is None else task, tuning={})  # timing does not pay
    holding = calibration or model.calibration
    plan, deterministic = options.plan_with(holding), deterministic or holding is not None
    result = sample(model, x, plan, screen=screen, deterministic=deterministic)
    return interpret(model, result, options, screen=screen, fpr=fpr, calibration=calibration)


def _bound(defaults: Options, calibration: Calibration) -> Options:
    """Defaults with the plan that a calibration was fitted with, and the interval that it gives."""
    names = ("passes", "seed", "sampler", "tolerance", "exact_last")
    interval = defaults.interval if calibration.task == "classification" else "conformal"
    return replace(defaults, interval=interval, **{name: getattr(calibration.plan, name) for name in names})


def _most_passes(
    passes: int | None, tolerance: float | None, max_passes: int | None, *, usual: float | None
) -> int | None:
    """The passes to plan for: with a tolerance, where a row ends at the latest. ``usual`` is the default tolerance."""
    if passes is not None and (tolerance is not None or (max_passes is not None and usual is not None)):
        raise InputError(
            f"with a tolerance each row has its own number of passes; give max_passes={passes!r} instead of passes, if "
            "rows should end there at the latest"
        )
    if max_passes is None:
        return passes if tolerance is None else _MAX_PASSES
    if tolerance is None and usual is None:
        raise InputError("max_passes goes with tolerance; without one every row gets the same number of passes")
    return max_passes
