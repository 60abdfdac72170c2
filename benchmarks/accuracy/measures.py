"""What is measured: log-likelihood of a mixture of passes, error, share of targets covered, and how far chance goes."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

__all__ = ["chance_band", "covered", "log_likelihood", "root_mean_square"]

Array = NDArray[np.float64]


def log_likelihood(means: Array, variances: Array | float, y: Array) -> float:
    """Gives the mean over rows of log (1/T) sum_t N(y; means_t, variances_t); passes (T, N), y (N,).

    With few passes it is biased towards less (Jensen), so T belongs beside it.
    """
    densities = -0.5 * ((y - means) ** 2 / variances + np.log(2 * np.pi * np.asarray(variances)))
    return float((logsumexp(densities, axis=0) - math.log(len(means))).mean())


def root_mean_square(errors: Array) -> float:
    """Gives the root of the mean squared error."""
    return float(np.sqrt((errors**2).mean()))


def covered(lower: Array, upper: Array, y: Array) -> float:
    """Gives the share of targets y (N,) inside their bounds (N,), ends included."""
    return float(((lower <= y) & (y <= upper)).mean())


def chance_band(level: float, held: int, tested: int, splits: int, *, share: float = 0.95, seed: int = 0) -> Array:
    """Gives where the mean coverage of split conformal intervals lies by chance with probability ``share``, (2,).

    Given n held-out rows the coverage follows Beta(n + 1 - l, l), l = floor((n + 1)(1 - level)); of the tested rows of
    a split a binomial number is covered. Random splits of the same rows are independent of each other, given the rows.
    """
    missed = math.floor(round((held + 1) * (1 - level), 9))
    if not missed:
        return np.ones(2)
    rng = np.random.default_rng(seed)
    chances = rng.beta(held + 1 - missed, missed, (10_000, splits))
    means = rng.binomial(tested, chances).mean(axis=1) / tested
    return np.asarray(np.quantile(means, [(1 - share) / 2, (1 + share) / 2]), np.float64)
