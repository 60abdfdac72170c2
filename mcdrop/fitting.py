"""What is fitted on rows of one's own: calibrations on held-out rows, screens on inlier rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mcdrop.bank import BANK_ROWS, Bank, build_bank
from mcdrop.calibration import LEVELS, Calibration, fit_calibration
from mcdrop.conformal import CONFORMAL
from mcdrop.engine import PassPlan, run_passes
from mcdrop.errors import UnknownName
from mcdrop.model import Model, check_model
from mcdrop.rows import Rows
from mcdrop.sampling import features_of, fingerprint, rows_of, sample, scores_under
from mcdrop.screening import SCORES, Evidence, Screen, check_fpr, parts_of
from mcdrop.summaries import TASKS

__all__ = ["calibrate", "fit_screen"]

_SPENT_STEP = 5


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
    if method is not None:
        UnknownName.check("calibration method", method, CONFORMAL)
    kept = replace(plan, keep_samples=method is not None and CONFORMAL[method].needs_samples)
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
    x_train: Any = None,
    layer: str | None = None,
    distance: str = "cosine",
) -> Screen:
    """Fits anomaly flags on inlier rows that the network was not trained on.

    A row is flagged where its conformal p-value against these rows is at most ``fpr``: of rows exchangeable with
    them, at most this share is flagged, on average over reference sets.

    Args:
        model: what ``wrap`` or ``load`` gave.
        x_reference: inlier rows, exchangeable with the inliers to come.
        score: one of ``SCORES``.
        fpr: false-positive rate of single rows.
        passes: None is the model's default, as for the seed.
        seed: of the masks.
        x_train: for the scores that read hidden features, the typical rows that others are compared with, such as
            those of the training; without them every second reference row is spent on that.
        layer: where features are read: a submodule's output; None is the first hidden layer of a plain multilayer
            perceptron, otherwise what enters the last linear layer.
        distance: one of ``DISTANCES``.

    Raises:
        InputError: unusable rows, an unknown name, or too few rows for the rate.
    """
    UnknownName.check("score", score, SCORES)
    plan, rows, bank = _plan(model, passes, seed), rows_of(model, x_reference), None
    if SCORES[score].needs_features:
        if x_train is None:
            typical, rows = rows.take(np.arange(0, rows.count, 2)), rows.take(np.arange(1, rows.count, 2))
        else:
            typical = rows_of(model, x_train)
        step = -(-typical.count // BANK_ROWS)
        typical = typical.take(np.arange(0, typical.count, step))
        bank = build_bank(features_of(model, typical, layer), distance=distance, layer=layer)
    if score == "combined" and bank is not None:
        spent = np.arange(rows.count) % _SPENT_STEP == 0
        bank = _with_typical(model, rows.take(np.flatnonzero(spent)), plan, bank)
        rows = rows.take(np.flatnonzero(~spent))
    check_fpr(fpr, rows.count)
    scores = scores_under(model, rows, plan, score, bank)
    # rows of its own, as they may be scored anew when the user's tensor holds something else
    return Screen(score, rows.copy(), scores, plan, fpr, bank, model.digest)


def _with_typical(model: Model, rows: Rows, plan: PassPlan, bank: Bank) -> Bank:
    """Gives the bank with the parts of the combined score of some typical rows, that others are ranked among."""
    summary = TASKS[model.task].read(run_passes(model.backend, rows, plan, statistics=TASKS[model.task].statistics))
    distance = bank.measure(features_of(model, rows, bank.layer))
    parts = parts_of(Evidence(summary, distance, bank))
    return replace(bank, typical={name: np.sort(values) for name, values in parts.items()})


def _plan(model: Model, passes: int | None, seed: int | None) -> PassPlan:
    check_model(model)
    plan = model.defaults.plan
    return replace(
        plan,
        passes=plan.passes if passes is None else passes,
        seed=plan.seed if seed is None else seed,
        keep_samples=False,
    )
