"""What is fitted on rows of one's own: calibrations on held-out rows, screens on inlier rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mcdrop.calibration import LEVELS, Calibration, fit_calibration
from mcdrop.conformal import CONFORMAL
from mcdrop.engine import PassPlan
from mcdrop.model import Model
from mcdrop.predict import fingerprint, sample, scores_under
from mcdrop.screening import Screen, check_fpr
from mcdrop.summaries import TASKS

__all__ = ["calibrate", "fit_screen"]


def calibrate(
    model: Model,
    x_held: Any,
    y_held: Any,
    *,
    method: str | None = None,
    passes: int | None = None,
    seed: int | None = None,
    levels: Sequence[float] = LEVELS,
    noise: Any = None,
) -> Calibration:
    """Fits conformal bounds or sets, noise, scale and temperature on rows that the network was not trained on.

    Args:
        model: what ``wrap`` or ``load`` gave.
        x_held: held-out inputs, exchangeable with those to come.
        y_held: their targets (N, D), or (N,) for one output or labels.
        method: one of ``CONFORMAL``; None is "standardised", for classes "lac".
        passes: the passes that will be asked for; None is the model's default, as for the seed.
        seed: the seed that will be asked for.
        levels: those that "cqr" is fitted for; the other methods hold for every level.
        noise: the noise variance of y where it is known, such as ``noise_from_weight_decay`` gives; None fits it.

    Raises:
        InputError: unusable rows or targets, or a method that does not suit the task.
    """
    plan = _plan(model, passes, seed)
    kept = replace(plan, keep_samples=method is not None and method in CONFORMAL and CONFORMAL[method].needs_samples)
    summary = TASKS[model.task].read(sample(model, x_held, kept))
    return fit_calibration(
        summary, y_held, task=model.task, plan=replace(plan, keep_samples=False),
        fingerprint=fingerprint(model, plan), method=method, levels=levels, noise=noise,
    )  # fmt: skip


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
    plan = _plan(model, passes, seed)
    rows = model.rows(x_reference)
    check_fpr(fpr, rows.count)
    return Screen(score, rows, scores_under(model, rows, plan, score), plan, fpr)


def _plan(model: Model, passes: int | None, seed: int | None) -> PassPlan:
    plan = model.defaults.plan
    return replace(
        plan,
        passes=plan.passes if passes is None else passes,
        seed=plan.seed if seed is None else seed,
        keep_samples=False,
    )
