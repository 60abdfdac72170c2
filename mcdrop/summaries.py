"""What the passes say, for each kind of task.

A task turns a network's outputs into statistics whose moments are gathered over the passes, and reads those moments
into a ``Summary``. To add a task, add one entry to ``TASKS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, softmax

from mcdrop.engine import PassResult, Statistics
from mcdrop.errors import InputError

__all__ = ["TASKS", "Classes", "Summary", "Task"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """What the passes of a classifier say about each row, (N,); entropies in nats."""

    label: NDArray[np.int64]
    entropy: Array
    expected_entropy: Array
    mutual_information: Array
    variation_ratio: Array


@dataclass(frozen=True)
class Summary:
    """Statistics of the passes, (N, D): the mean function's mean and variance, and the noise that a head reports.

    ``epistemic`` is the variance over the passes (unbiased), ``aleatoric`` the mean of the noise variance that the
    network gives itself, or None. ``standard_error`` is the Monte Carlo error of the mean, with its ``degrees`` of
    freedom (N,); ``passes`` (N,). ``support`` is where the mean function can lie.
    """

    passes: NDArray[np.int64]
    degrees: NDArray[np.int64]
    mean: Array
    epistemic: Array
    aleatoric: Array | None
    standard_error: Array
    deterministic: Array
    samples: Array | None
    support: tuple[float, float]
    classes: Classes | None = None

    @property
    def variance(self) -> Array:
        """Epistemic variance plus the noise variance where the network reports one (Kendall and Gal 2017, eq. 9)."""
        return self.epistemic if self.aleatoric is None else self.epistemic + self.aleatoric


@dataclass(frozen=True)
class Task:
    """A kind of task: which statistics of the outputs are gathered, and how they are read into a summary."""

    statistics: Statistics
    read: Callable[[PassResult], Summary]


def _basic(
    result: PassResult, task: str, *, aleatoric: Array | None = None, support: tuple[float, float] = (-np.inf, np.inf)
) -> Summary:
    """Reads the mean function, the first of the statistics."""
    width = TASKS[task].statistics.width(result.mean.shape[-1])
    return Summary(
        passes=result.passes,
        degrees=result.degrees,
        mean=result.mean[..., :width],
        epistemic=result.variance[..., :width],
        aleatoric=aleatoric,
        standard_error=result.standard_error[..., :width],
        deterministic=result.deterministic[..., :width],
        samples=None if result.samples is None else result.samples[..., :width],
        support=support,
    )


def _all(count: int) -> int:
    return count


def _half(count: int) -> int:
    return count // 2


def _identity(outputs: Array) -> Array:
    return outputs


def _read_regression(result: PassResult) -> Summary:
    return _basic(result, "regression")


def _split_gaussian(outputs: Array) -> Array:
    """Mean and log-variance halves of the last axis -> mean and variance halves."""
    if outputs.shape[-1] % 2:
        raise InputError(
            "a gaussian network gives means and log-variances side by side, an even number of outputs; "
            f"this one gives {outputs.shape[-1]}"
        )
    mean, log_variance = np.split(outputs, 2, axis=-1)
    return np.concatenate([mean, np.exp(log_variance)], axis=-1)


def _read_gaussian(result: PassResult) -> Summary:
    return _basic(result, "gaussian", aleatoric=result.mean[..., result.mean.shape[-1] // 2 :])


def _class_statistics(outputs: Array) -> Array:
    """Logits (t, N, C) -> probabilities, one vote for the largest, and the entropy of the pass: (t, N, 2C + 1)."""
    if outputs.shape[-1] < 2:
        raise InputError("a classifier gives one logit for each class, at least two; this network gives one output")
    chances = softmax(outputs, axis=-1)
    votes = np.zeros_like(chances)
    np.put_along_axis(votes, chances.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
    return np.concatenate([chances, votes, entr(chances).sum(axis=-1, keepdims=True)], axis=-1)


def _read_classes(result: PassResult) -> Summary:
    """Entropy H(mean p), expected entropy mean H(p_t), their difference and the votes (Gal 2016, section 3.3.1)."""
    width = result.mean.shape[-1] // 2
    chances, votes = result.mean[..., :width], result.mean[..., width:-1]
    entropy, expected = entr(chances).sum(axis=-1), result.mean[..., -1]
    classes = Classes(
        label=chances.argmax(axis=-1),
        entropy=entropy,
        expected_entropy=expected,
        mutual_information=np.maximum(entropy - expected, 0.0),  # never negative but for rounding (Jensen)
        variation_ratio=1 - votes.max(axis=-1),
    )
    summary = _basic(result, "classification", support=(0.0, 1.0))
    return Summary(**{**vars(summary), "classes": classes})


TASKS: dict[str, Task] = {
    "classification": Task(Statistics(_class_statistics, _half), _read_classes),
    "gaussian": Task(Statistics(_split_gaussian, _half), _read_gaussian),
    "regression": Task(Statistics(_identity, _all), _read_regression),
}
