"""Small fits on held-out rows: the noise of y, the scale of predictive deviations, the temperature of classes."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax

__all__ = ["fit_noise", "fit_scale", "fit_temperature", "tempered"]

Array = NDArray[np.float64]

_ROUNDS = 200
_TEMPERATURES = (0.05, 20.0)
_TINY = float(np.finfo(np.float64).tiny)


def fit_noise(residuals: Array, epistemic: Array) -> Array:
    """Gives the noise variance v (D,) that makes residuals (n, D) most probable under N(0, epistemic + v).

    Fisher scoring, as for the between-study variance in meta-analysis (Hardy and Thompson 1996); at least a millionth
    of the mean squared residual.
    """
    squares = residuals**2
    least = np.maximum(1e-6 * squares.mean(axis=0), _TINY)
    noise: Array = np.maximum(squares.mean(axis=0), least)
    for _ in range(_ROUNDS):
        total = epistemic + noise
        weight = (total.min(axis=0) / total) ** 2  # scaled to at most 1, so that it neither overflows nor vanishes
        new = np.maximum((weight * (squares - epistemic)).sum(axis=0) / weight.sum(axis=0), least)
        if (np.abs(new - noise) <= 1e-10 * noise).all():
            break
        noise = new
    return noise


def fit_scale(residuals: Array, variance: Array) -> Array:
    """Gives S (D,), S^2 = mean(residual^2 / variance): the most probable scale of normal errors (Laves 2020)."""
    ratio = residuals**2 / np.maximum(variance, _TINY)
    return np.asarray(np.sqrt(np.maximum(ratio.mean(axis=0), _TINY)), np.float64)


def tempered(chances: Array, temperature: float) -> Array:
    """Gives probabilities (N, C) with their logarithms divided by the temperature, normalised again."""
    powers: Array = softmax(np.log(np.maximum(chances, _TINY)) / temperature, axis=-1)
    return powers


def fit_temperature(chances: Array, labels: NDArray[np.int64]) -> float:
    """Gives the temperature that makes labels (N,) most probable under the mean probabilities (N, C).

    Guo et al. 2017, applied to the mean of the passes ("pool then calibrate", Rahaman and Thiery 2021): scaling each
    pass before the mean would leave the mean under-confident.
    """

    def loss(logarithm: float) -> float:
        true = np.take_along_axis(tempered(chances, math.exp(logarithm)), labels[..., None], axis=-1)
        return float(-np.log(np.maximum(true, _TINY)).mean())

    low, high = map(math.log, _TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return math.exp(float(found.x))
