"""What is fitted on rows of one's own: calibrations on held-out rows, screens on inlier rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.bank import BANK_ROWS, DISTANCES, Bank, build_bank, check_typical
from mcdrop.calibration import LEVELS, Calibration, fit_calibration
from mcdrop.conformal import CONFORMAL
from mcdrop.engine import PassPlan, run_passes
from mcdrop.errors import InputError, UnknownName
from mcdrop.model import Model, check_model
from mcdrop.rows import Rows
from mcdrop.sampling import features_of, fingerprint, rows_of, sample, scores_under
from mcdrop.screening import SCORES, Evidence, Screen, check_fpr, parts_of
from mcdrop.summaries import TASKS

__all__ = ["calibrate", "fit_screen"]

Places = NDArray[np.int64]

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
        layer: where those features are read: a submodule's output; None is the first hidden layer of a plain multilayer
            perceptron, otherwise what enters the last linear layer.
        distance: one of ``DISTANCES``.

    Raises:
        InputError: unusable rows, an unknown name, ``x_train`` or ``layer`` for a score that reads no hidden features,
            or too few rows for the rate.
    """
    _check_choices(score, x_train, layer, distance)
    plan, rows, bank = _plan(model, passes, seed), rows_of(model, x_reference), None
    if SCORES[score].needs_features:
        left = np.arange(rows.count)
        if x_train is None:
            bank = _bank(model, rows, left[::2], "the reference", layer, distance)
            left = left[1::2]
        else:
            typical = rows_of(model, x_train)
            bank = _bank(model, typical, np.arange(typical.count), "x_train", layer, distance)
        if score == "combined":
            spent = np.arange(len(left)) % _SPENT_STEP == 0
            bank = _with_typical(model, rows, left[spent], plan, bank)
            left = left[~spent]
        rows = rows.take(left)
    check_fpr(fpr, rows.count)
    scores = scores_under(model, rows, plan, score, bank)
    # rows of its own, as they may be scored anew when the user's tensor holds something else
    return Screen(score, rows.copy(), scores, plan, fpr, bank, model.digest)


def _check_choices(score: str, x_train: Any, layer: str | None, distance: str) -> None:
    UnknownName.check("score", score, SCORES)
    UnknownName.check("distance", distance, DISTANCES)
    for name, given in {"x_train": x_train, "layer": layer}.items():
        if given is not None and not SCORES[score].needs_features:
            reading = ", ".join(sorted(known for known, other in SCORES.items() if other.needs_features))
            raise InputError(
                f"{name} has no use: score {score!r} reads no hidden features; leave it out or choose one of: {reading}"
            )


def _bank(model: Model, rows: Rows, places: Places, given_as: str, layer: str | None, distance: str) -> Bank:
    """Fits a bank on the rows at these places, or on as many of them as a bank holds."""
    places = places[:: -(-len(places) // BANK_ROWS)]
    features = features_of(model, rows.take(places), layer)
    return build_bank(features, distance=distance, layer=layer, named=lambda at: f"row {places[at]} of {given_as}")


def _with_typical(model: Model, rows: Rows, places: Places, plan: PassPlan, bank: Bank) -> Bank:
    """Gives the bank with the parts of the combined score of some typical rows, that others are ranked among."""
    rows = rows.take(places)
    features = features_of(model, rows, bank.layer)
    check_typical(features, lambda at: f"row {places[at]} of the reference")
    summary = TASKS[model.task].read(run_passes(model.backend, rows, plan, statistics=TASKS[model.task].statistics))
    parts = parts_of(Evidence(summary, bank.measure(features), bank))
    bad = ~np.logical_and.reduce([np.isfinite(values) for values in parts.values()])
    if bad.any():  # it would set the tail that all others are ranked by
        raise InputError(
            f"the network's output for row {places[bad.argmax()]} of the reference is not finite; leave out such rows "
            f"({bad.sum()} of the {len(bad)} typical ones), or mend the network"
        )
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
