"""One set, start to end: the published recipe, ours, and what our intervals cover. Every answer comes from mcdrop."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

import mcdrop
from benchmarks.accuracy.data import RegressionSet, split_held
from benchmarks.accuracy.measures import chance_band, covered, log_likelihood, root_mean_square
from benchmarks.accuracy.nets import Recipe, RegressionNet
from benchmarks.accuracy.published import Published
from benchmarks.accuracy.recipes import COVERAGE, PAPER_PASSES, candidates, paper_recipe
from benchmarks.accuracy.training import train

__all__ = ["run_ours", "run_paper"]

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Result = dict[str, Any]

PASSES = 1000  # of our networks on test rows
CHOOSING_PASSES = 200  # on held-out rows
LEVELS = (0.8, 0.9, 0.95)
SEED = 0


def run_paper(data: RegressionSet, published: Published, *, effort: float = 1.0) -> Result:
    """Trains as published, and reads RMSE and log-likelihood (at the published tau) off the test rows."""
    recipe = paper_recipe(published, len(data.train[0]), effort)
    nets, seconds = _timed(lambda: _train(recipe, data, data.train))
    errors, likelihoods = [], []
    for net, test in zip(nets, data.test, strict=True):
        passes = _passes(net, data.x[test], PAPER_PASSES)[..., 0]
        errors.append(root_mean_square(passes.mean(axis=0) - data.y[test]))
        likelihoods.append(log_likelihood(passes, 1 / published.tau, data.y[test]))
    return _result(errors, likelihoods, passes=PAPER_PASSES, train_seconds=seconds, recipe=asdict(recipe))


def run_ours(data: RegressionSet, *, effort: float = 1.0) -> Result:
    """Chooses recipe and noise scale of each split on the last fifth of its training rows, then trains on all of them.

    The test rows of a split are read once, for the figures. The networks of the fixed recipe ``COVERAGE``, which are
    trained on the way, are those whose intervals are measured: the held-out rows chose nothing of theirs.
    """
    recipes = candidates(len(data.train[0]), effort)
    fits, helds = zip(*map(split_held, data.train), strict=True)
    scores, scales, seconds = np.empty((len(recipes), len(fits))), np.empty((len(recipes), len(fits))), 0.0
    coverage: Result = {}
    for i, recipe in enumerate(recipes):
        nets, spent = _timed(lambda recipe=recipe: _train(recipe, data, fits))  # type: ignore[misc]
        seconds += spent
        for k, (net, held) in enumerate(zip(nets, helds, strict=True)):
            scores[i, k], scales[i, k] = _fit_noise_scale(_passes(net, data.x[held], CHOOSING_PASSES), data.y[held])
        if i == COVERAGE:
            coverage = _coverage(data, nets, helds)
    chosen = scores.argmax(axis=0)
    errors, likelihoods = np.empty(len(fits)), np.empty(len(fits))
    for i in sorted(set(chosen.tolist())):
        which = np.flatnonzero(chosen == i)
        nets, spent = _timed(lambda i=i, which=which: _train(recipes[i], data, data.train, which))  # type: ignore[misc]
        seconds += spent
        for k, net in zip(which.tolist(), nets, strict=True):
            net.noise_scale = float(scales[i, k])
            passes, y = _passes(net, data.x[data.test[k]], PASSES), data.y[data.test[k]]
            errors[k] = root_mean_square(passes[..., 0].mean(axis=0) - y)
            likelihoods[k] = log_likelihood(passes[..., 0], passes[..., 1], y)
    return _result(
        errors, likelihoods, passes=PASSES, train_seconds=seconds, candidates=[asdict(recipe) for recipe in recipes],
        chosen=chosen.tolist(), noise_scale=[float(scales[i, k]) for k, i in enumerate(chosen)], coverage=coverage,
    )  # fmt: skip


def _timed(work: Callable[[], list[RegressionNet]]) -> tuple[list[RegressionNet], float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _train(
    recipe: Recipe, data: RegressionSet, rows: tuple[Rows, ...], which: NDArray[np.int64] | None = None
) -> list[RegressionNet]:
    used = rows if which is None else [rows[k] for k in which]
    return train(recipe, [data.x[r] for r in used], [data.y[r] for r in used], SEED)


def _wrap(net: RegressionNet, x: Array) -> mcdrop.Model:
    return mcdrop.wrap(net, example=x[:8], task="gaussian" if net.heads else "regression")


def _passes(net: RegressionNet, x: Array, passes: int) -> Array:
    """Means, and noise variances of a head, of each pass: (T, N, 1 or 2)."""
    samples = mcdrop.sample(_wrap(net, x), x, mcdrop.PassPlan(passes, SEED, keep_samples=True)).samples
    return np.asarray(samples, np.float64)


def _fit_noise_scale(passes: Array, y: Array) -> tuple[float, float]:
    """The largest log-likelihood over factors of the noise variance, and the factor that gives it."""
    means, noise = passes[..., 0], passes[..., 1]
    found = minimize_scalar(
        lambda log: -log_likelihood(means, noise * math.exp(log), y), bounds=(-5, 5), method="bounded"
    )
    return -float(found.fun), math.exp(float(found.x))


def _coverage(data: RegressionSet, nets: list[RegressionNet], helds: tuple[Rows, ...]) -> Result:
    """Share of test rows covered and mean width, over all splits, for each level and interval; no width: infinite."""
    hits: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for net, held, test in zip(nets, helds, data.test, strict=True):
        model = _wrap(net, data.x[held])
        calibration = mcdrop.calibrate(model, data.x[held], data.y[held], passes=PASSES, seed=SEED)
        result = mcdrop.sample(model, data.x[test], mcdrop.PassPlan(PASSES, SEED))
        for level in LEVELS:
            for interval in ("normal", "predictive", "conformal"):
                options = replace(model.defaults, passes=PASSES, seed=SEED, level=level, interval=interval)
                given = calibration if interval == "conformal" else None
                p = mcdrop.interpret(model, result, options, calibration=given)
                share = covered(p.lower[:, 0], p.upper[:, 0], data.y[test])
                hits.setdefault((level, interval), []).append((share, float((p.upper - p.lower).mean())))
    found: Result = {
        str(level): {"band": chance_band(level, len(helds[0]), len(data.test[0]), len(nets)).tolist()}
        for level in LEVELS
    }
    for (level, interval), values in hits.items():
        share, width = np.mean(values, axis=0).tolist()
        found[str(level)][interval] = {"covered": share, "width": width if math.isfinite(width) else None}
    return found


def _result(errors: Any, likelihoods: Any, **more: Any) -> Result:
    each = {"rmse": np.asarray(errors), "log_likelihood": np.asarray(likelihoods)}
    figures = {
        name: {
            "mean": float(values.mean()),
            "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
            "splits": values.tolist(),
        }
        for name, values in each.items()
    }
    return {**figures, **more}
