"""Figures from records, one function each: axes in, axes out. Nothing here runs a model.

Each function draws on the axes it is given, or on those of a new figure, and gives them back. Matplotlib comes with
``pip install 'mcdrop[plot]'``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from mcdrop.errors import InputError, MissingExtra
from mcdrop.intervals import check_level
from mcdrop.masks import is_whole
from mcdrop.rows import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["band", "convergence", "coverage", "gallery", "reliability", "scores"]

Array = NDArray[np.float64]

_LINE, _BAND, _POINT, _ALARM = "#1f4e79", "#9dc3e6", "#7f7f7f", "#c00000"


class _Band(Protocol):
    """What a band is drawn from: a ``Prediction``."""

    @property
    def mean(self) -> Array: ...
    @property
    def lower(self) -> Array: ...
    @property
    def upper(self) -> Array: ...
    @property
    def level(self) -> float: ...
    @property
    def interval_kind(self) -> str: ...


class _Scored(Protocol):
    """What strangeness is drawn from: a ``Screened``, or a ``Prediction`` with a screen."""

    @property
    def score(self) -> Any: ...
    @property
    def p_value(self) -> Any: ...
    @property
    def is_anomaly(self) -> Any: ...


def band(
    x: ArrayLike, prediction: _Band, *, y: ArrayLike | None = None, seen: ArrayLike | None = None, output: int = 0,
    ax: "Axes | None" = None,
) -> "Axes":  # fmt: skip
    """Draws mean and interval over a single input x (N,) or (N, 1).

    ``y`` are points at ``seen`` (or at x) to be drawn beside them, such as the training data.
    """
    ax = _axes(ax)
    at = _column(x)
    if len(at) != len(prediction.mean):
        raise InputError(f"x must have {len(prediction.mean)} rows as the prediction has, got {len(at)}")
    order = np.argsort(at, kind="stable")
    bounds = [values.reshape(len(at), -1) for values in (prediction.lower, prediction.mean, prediction.upper)]
    _check_place("output", output, bounds[0].shape[1])
    lower, mean, upper = (values[order, output] for values in bounds)
    label = f"{prediction.level:.0%} {prediction.interval_kind} interval"
    ax.fill_between(at[order], lower, upper, color=_BAND, alpha=0.6, linewidth=0, label=label)
    ax.plot(at[order], mean, color=_LINE, label="mean")
    if y is not None:
        ax.plot(_column(x if seen is None else seen), _column(y), ".", color=_POINT, label="data")
    ax.set(xlabel="x", ylabel="y")
    ax.legend()
    return ax


def reliability(expected: ArrayLike, observed: ArrayLike, *, label: str = "model", ax: "Axes | None" = None) -> "Axes":
    """Draws what ``calibration_curve`` gives: the share of y below each predicted quantile, and the diagonal."""
    _check_as_many("expected and observed shares", expected, observed)
    ax = _diagonal(ax)
    ax.plot(np.asarray(expected), np.asarray(observed), color=_LINE, label=label)
    ax.set(xlabel="predicted share", ylabel="observed share")
    ax.legend()
    return ax


def coverage(
    levels: ArrayLike, measured: ArrayLike, *, label: str = "intervals", rows: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":  # fmt: skip
    """Draws measured coverage over the nominal level; with ``rows`` plus or minus two standard errors of a share."""
    _check_as_many("levels and measured shares", levels, measured)
    nominal, found = np.asarray(levels, np.float64), np.asarray(measured, np.float64)
    ax = _diagonal(ax)
    if rows is not None:
        error = 2 * np.sqrt(nominal * (1 - nominal) / rows)
        ax.fill_between(nominal, nominal - error, nominal + error, color=_BAND, alpha=0.4, linewidth=0)
    ax.plot(nominal, found, "o-", color=_LINE, label=label)
    ax.set(xlabel="nominal level", ylabel="share of y inside")
    ax.legend()
    return ax


def scores(found: _Scored, *, reference: ArrayLike | None = None, bins: int = 50, ax: "Axes | None" = None) -> "Axes":
    """Draws the distribution of scores, beside that of reference rows, and the smallest score that was flagged.

    Scores that are not finite, as of rows whose outputs are not, are left out and counted.
    """
    ax = _axes(ax)
    score, flagged = _of_screen(found)
    known = np.empty(0) if reference is None else numbers(reference, "reference", finite=False).astype(np.float64)
    finite = np.isfinite(score)
    if not finite.any():
        raise InputError(f"none of the {len(score)} scores is finite, so there is nothing to draw")
    seen, known = score[finite], known[np.isfinite(known)]
    edges = np.histogram_bin_edges(np.concatenate([seen, known]), bins).tolist()
    if len(known):
        ax.hist(known, edges, density=True, color=_POINT, alpha=0.5, label="reference")
    label = "rows" if finite.all() else f"rows ({int((~finite).sum())} not finite, left out)"
    ax.hist(seen, edges, density=True, color=_LINE, alpha=0.6, label=label)
    if (flagged & finite).any():
        first = float(score[flagged & finite].min())
        ax.axvline(first, color=_ALARM, label=f"flagged from here ({int(flagged.sum())})")
    ax.set(xlabel="score", ylabel="density")
    ax.legend()
    return ax


def gallery(images: ArrayLike, found: _Scored, axes: "Sequence[Axes] | NDArray[Any]") -> "NDArray[Any]":
    """Draws the strangest images (N, H, W) or (N, H, W, 3), strangest first, one on each of the axes.

    A score that is NaN is the strangest, as it is to the p-values.
    """
    pictures, score = np.asarray(images), _of_screen(found)[0]
    if pictures.ndim != 3 and (pictures.ndim != 4 or pictures.shape[-1] not in (1, 3, 4)):
        raise InputError(
            f"images must be (N, H, W), or (N, H, W, 3) with channels last, got the shape {pictures.shape}"
        )
    if len(pictures) != len(score):
        raise InputError(f"there are {len(pictures)} images for {len(score)} scores")
    flat = np.asarray(axes, dtype=object).ravel()
    for ax in flat:
        ax.set_axis_off()
    strangest = np.lexsort((-score, ~np.isnan(score)))
    for ax, row in zip(flat, strangest, strict=False):
        ax.imshow(pictures[row], cmap="gray" if pictures.ndim == 3 else None)
        colour = _ALARM if found.is_anomaly[row] else "black"
        ax.set_title(f"row {row}, p = {found.p_value[row]:.2g}", fontsize=8, color=colour)
    return flat


def convergence(
    samples: ArrayLike, *, row: int = 0, output: int = 0, level: float = 0.95, ax: "Axes | None" = None
) -> "Axes":
    """Draws how the mean of one row settles with the passes of ``samples`` (T, N, D).

    The band is the interval of the mean (Monte Carlo error only, for independent passes), the thin lines are the
    quantiles of the passes themselves, which do not shrink.
    """
    level = check_level(level)
    if samples is None:
        raise InputError("there are no samples: predict with keep_samples=True and give its samples")
    kept = numbers(samples, "samples", finite=False).astype(np.float64)
    if kept.ndim < 2 or len(kept) < 2:
        raise InputError(f"samples must be at least two passes (T, N, D), got the shape {kept.shape}")
    kept = kept.reshape(len(kept), kept.shape[1], -1)
    _check_place("row", row, kept.shape[1])
    _check_place("output", output, kept.shape[2])
    ax = _axes(ax)
    draws = kept[:, row, output]
    passes = np.arange(2, len(draws) + 1)
    mean = np.cumsum(draws)[1:] / passes
    spread = np.sqrt(np.maximum(np.cumsum((draws - draws[0]) ** 2)[1:] / passes - (mean - draws[0]) ** 2, 0))
    half = stdtrit(passes - 1, 0.5 + level / 2) * spread / np.sqrt(passes - 1)
    ax.fill_between(passes, mean - half, mean + half, color=_BAND, alpha=0.6, linewidth=0, label="error of the mean")
    ax.plot(passes, mean, color=_LINE, label="mean")
    tails = [(1 - level) / 2, (1 + level) / 2]
    some = np.unique(np.geomspace(2, len(draws), 200).astype(np.int64))
    settled = np.array([np.quantile(draws[:count], tails) for count in some])
    ax.plot(some, settled, color=_POINT, linewidth=0.8, label=[f"{level:.0%} of the passes", "_"])
    ax.set(xlabel="passes", ylabel="output", xscale="log")
    ax.legend()
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingExtra("matplotlib", "plot") from None
    return plt.subplots()[1]


def _diagonal(ax: "Axes | None") -> "Axes":
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], "--", color=_POINT, linewidth=0.8)
    ax.set_aspect("equal")
    return ax


def _check_place(name: str, index: int, count: int) -> None:
    if not is_whole(index) or not -count <= index < count:
        raise InputError(f"{name} must be a whole number from 0 to {count - 1}, got {index!r}")


def _check_as_many(names: str, first: ArrayLike, second: ArrayLike) -> None:
    shapes = np.shape(first), np.shape(second)
    if shapes[0][:1] != shapes[1][:1]:
        raise InputError(f"{names} must be as many, got the shapes {shapes[0]} and {shapes[1]}")


def _column(values: ArrayLike) -> Array:
    column = numbers(values, "what is drawn", finite=False).astype(np.float64)
    if column.size != len(column):
        raise InputError(f"a figure over x needs a single column, got the shape {column.shape}")
    return column.ravel()


def _of_screen(found: _Scored) -> tuple[Array, NDArray[np.bool_]]:
    if found.score is None:
        raise InputError("there are no scores: predict with a fitted screen, or use mcdrop.screen")
    return np.asarray(found.score, np.float64), np.asarray(found.is_anomaly, np.bool_)
