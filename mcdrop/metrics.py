"""Measures of intervals, predictive distributions and rankings, where no well-kept library has them.

For ROC and precision-recall curves, Brier score, log loss and calibration of classes use scikit-learn or torchmetrics.
Targets ``y``, bounds, means and standard deviations are arrays of one shape, (N, D) or (N,); a measure is their mean.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from mcdrop.errors import InputError
from mcdrop.intervals import check_level
from mcdrop.masks import is_whole
from mcdrop.rows import numbers

__all__ = ["aurc", "crps_gaussian", "crps_samples", "ence", "interval_score", "mean_width", "picp"]

Array = NDArray[np.float64]


def picp(y: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Gives the share of targets inside their interval, bounds included; NaN where a target or a bound is.

    Prediction interval coverage probability (Khosravi et al. 2011, eq. 6).
    """
    y, lower, upper = _same(y, lower, upper)
    unknown = np.isnan(y) | np.isnan(lower) | np.isnan(upper)
    return float(np.where(unknown, np.nan, (lower <= y) & (y <= upper)).mean())


def mean_width(lower: ArrayLike, upper: ArrayLike) -> float:
    """Gives the mean width of intervals; infinite where one is."""
    lower, upper = _same(lower, upper)
    return float((upper - lower).mean())


def interval_score(y: ArrayLike, lower: ArrayLike, upper: ArrayLike, level: float) -> float:
    """Gives the mean of width + 2 / (1 - level) * (how far y lies outside); smaller is better.

    A proper score of central intervals (Gneiting and Raftery 2007, eq. 43).
    """
    level = check_level(level)
    y, lower, upper = _same(y, lower, upper)
    outside = np.maximum(lower - y, 0) + np.maximum(y - upper, 0)
    return float((upper - lower + 2 / (1 - level) * outside).mean())


def crps_gaussian(y: ArrayLike, mean: ArrayLike, std: ArrayLike) -> float:
    """Gives the mean continuous ranked probability score of normal predictions; smaller is better.

    std * (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / std (Gneiting et al. 2005, eq. 5), which nears
    abs(y - mean) where std nears 0, and is that there.
    """
    y, mean, std = _same(y, mean, std)
    _check_spread(std)
    apart = y - mean
    with np.errstate(over="ignore"):  # where z is infinite, its product with std is not
        z = np.divide(apart, std, out=np.zeros_like(std), where=std != 0)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    scores = apart * (2 * ndtr(z) - 1) + std * (2 * density - 1 / np.sqrt(np.pi))
    return float(np.where(std != 0, scores, np.abs(apart)).mean())


def crps_samples(y: ArrayLike, samples: ArrayLike) -> float:
    """Gives the mean CRPS of the empirical distribution of samples (T, N, ...); smaller is better.

    E|X - y| - E|X - X'| / 2 over all pairs of samples (Gneiting and Raftery 2007, eq. 21).
    """
    draws, y = _array(samples), _array(y)
    if draws.shape[1:] != y.shape or draws.size == 0:
        raise InputError(f"samples must have the shape (T, *{y.shape}) and hold values, got {draws.shape}")
    count = len(draws)
    # sum over pairs of |x_i - x_j| from the ordered values: each is subtracted and added as often as its rank says
    weight = (2 * np.arange(1, count + 1) - count - 1).reshape(-1, *(1,) * y.ndim)
    pairs = 2 * (np.sort(draws, axis=0) * weight).sum(axis=0) / count**2
    return float((np.abs(draws - y).mean(axis=0) - pairs / 2).mean())


def ence(y: ArrayLike, mean: ArrayLike, std: ArrayLike, bins: int = 15) -> float:
    """Gives the expected normalised calibration error: the mean over bins of |RMV - RMSE| / RMV.

    Rows are cut into bins of equal count by their predicted standard deviation; RMV is its root mean square in a bin,
    RMSE that of the errors (Levi, Gispan, Giladi and Fetaya 2019, eq. 8). Infinite where a bin has errors and no
    spread.
    """
    y, mean, std = (values.ravel() for values in _same(y, mean, std))
    _check_spread(std)
    if not is_whole(bins) or not 1 <= bins <= len(y):
        raise InputError(f"bins must be a whole number from 1 to {len(y)}, the number of values; got {bins!r}")
    parts = np.array_split(np.argsort(std, kind="stable"), bins)
    predicted = np.array([np.sqrt((std[part] ** 2).mean()) for part in parts])
    found = np.array([np.sqrt(((y - mean)[part] ** 2).mean()) for part in parts])
    apart = np.abs(predicted - found)
    unspread = np.where(apart > 0, np.inf, 0.0)
    return float(np.divide(apart, predicted, out=unspread, where=predicted != 0).mean())


def aurc(loss: ArrayLike, score: ArrayLike) -> float:
    """Gives the area under the risk-coverage curve: the mean over k of the mean loss of the k least strange rows.

    ``loss`` (N,), such as 0 or 1 for right or wrong, ``score`` (N,), larger is stranger (Geifman, Uziel and El-Yaniv
    2019, eq. 1). Rows of equal score count with their mean loss, so their order does not matter.
    """
    loss, score = _same(loss, score)
    if loss.ndim != 1:
        raise InputError(f"loss and score must be one number a row (N,), got {loss.shape}")
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    mean_of_group = np.bincount(group, loss) / sizes
    ordered = np.repeat(mean_of_group, sizes)
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1)).mean())


def _same(*values: ArrayLike) -> tuple[Array, ...]:
    """Gives arrays of one shape, float64."""
    arrays = tuple(map(_array, values))
    if len({array.shape for array in arrays}) > 1 or arrays[0].size == 0:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise InputError(f"the arrays must have one shape and hold values, got {shapes}")
    return arrays


def _array(value: ArrayLike) -> Array:
    if np.ma.is_masked(value):
        raise InputError("an array has masked values, which no measure can count; leave out such rows")
    single = np.isscalar(value) or getattr(value, "ndim", 1) == 0
    read = numbers([value] if single else value, "what is measured", finite=False).astype(np.float64)
    return read.reshape(()) if single else read


def _check_spread(std: Array) -> None:
    if (std < 0).any():
        raise InputError(f"standard deviations must not be negative, got {std[std < 0][0]:g}")
