"""What the passes say, for each kind of task.

A task turns a network's outputs into statistics whose moments are gathered over the passes, and reads those moments
into a ``Summary``. To add a task, add one entry to ``TASKS``.

Outputs may be dense. Regression takes any shape (N, ...). Where there are more than two axes the channels are axis 1,
as in torch's losses: classes (N, C, H, W) are read as (N, H, W, C), and a gaussian head's (N, 2 C, H, W) as means and
log-variances (N, C, H, W). Statistics of classes then have one entry for each place, (N, H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, softmax

from mcdrop.engine import PassResult, Statistics
from mcdrop.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TASKS",
    "Classes",
    "Summary",
    "Task",
    "corrected_mutual_information",
    "noise_from_weight_decay",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Classes:
    """What the passes of a classifier say about each row, (N,); entropies in nats.

    ``mutual_information`` lies between 0 and the smaller of log T and log C. From T passes it comes out too small, by
    sum_c Var(p_c) / (2 T p_c) to first order, because the entropy of an estimated mean is too small while the expected
    entropy is unbiased; ``corrected_mutual_information`` adds that back. Where a pass has no probabilities, since its
    logits overflowed, all but the label are NaN, and the label is no answer.
    """

    label: NDArray[np.int64]
    entropy: Array
    expected_entropy: Array
    mutual_information: Array
    variation_ratio: Array


@dataclass(frozen=True, eq=False)
class Summary:
    """Statistics of the passes, (N, D): the mean function's mean and variance, and the noise that a head reports.

    ``epistemic`` is the variance over the passes: unbiased for independent ones, for balanced ones very nearly from 64
    on, and too large by up to 1 / T of it below. ``aleatoric`` is the mean of the noise variance that the network gives
    itself, or None. ``standard_error`` is the Monte Carlo error of the mean, with its ``degrees`` of freedom (N,);
    below 64 balanced passes it is that of independent ones, which is wider (see ``Gathered.read``). ``passes`` (N,).
    ``deterministic`` is the output with every draw off, where it was asked for. ``support`` is where the mean function
    can lie. ``samples`` are all passes (T, N, D) where kept, ``log_noise`` the logarithm of the noise variance of each
    where a head gives one. ``scale`` (D,) is what a calibration multiplies the standard deviation of predictions of y
    by.
    """

    passes: NDArray[np.int64]
    degrees: NDArray[np.int64]
    mean: Array
    epistemic: Array
    aleatoric: Array | None
    standard_error: Array
    deterministic: Array | None
    samples: NDArray[np.floating[Any]] | None
    support: tuple[float, float]
    classes: Classes | None = None
    log_noise: NDArray[np.floating[Any]] | None = None
    scale: Array | None = None

    @property
    def variance(self) -> Array:
        """Epistemic variance plus the noise variance where the network reports one (Kendall and Gal 2017, eq. 9)."""
        return self.epistemic if self.aleatoric is None else self.epistemic + self.aleatoric

    def take(self, which: Any) -> "Summary":
        """Gives the summary of some rows: a slice, an index array or a mask."""
        by_row = ("passes", "degrees", "mean", "epistemic", "aleatoric", "standard_error", "deterministic")
        rows = {name: value[which] for name in by_row if (value := getattr(self, name)) is not None}
        passes = ("samples", "log_noise")
        rows |= {name: value[:, which] for name in passes if (value := getattr(self, name)) is not None}
        if self.classes is not None:
            rows["classes"] = Classes(**{name: value[which] for name, value in vars(self.classes).items()})
        return replace(self, **rows)


@dataclass(frozen=True)
class Task:
    """A kind of task: which statistics of the outputs are gathered, and how they are read into a summary."""

    statistics: Statistics
    read: Callable[[PassResult], Summary]


def noise_from_weight_decay(weight_decay: float, *, rows: int, p: float, length_scale: float = 1.0) -> float:
    """Gives the noise variance that weight decay implies, 1 / tau with tau = (1 - p) l^2 / (2 N lambda).

    Gal and Ghahramani (2016, eq. 7), for the loss mean((y - f)^2) / 2 + lambda * sum(W^2) over N rows with drop rate p
    and prior length scale l; in the units of y in that loss. With torch's ``MSELoss`` and an optimiser's
    ``weight_decay=w`` lambda is w / 4.

    Raises:
        InputError: a number that is not above 0, or p outside [0, 1).
    """
    if not (weight_decay > 0 and rows > 0 and length_scale > 0 and 0 <= p < 1):
        raise InputError(
            "noise from weight decay needs weight_decay, rows and length_scale above 0 and p in [0, 1), got "
            f"{weight_decay:g}, {rows:g}, {length_scale:g} and {p:g}"
        )
    return 2 * rows * weight_decay / ((1 - p) * length_scale**2)


def corrected_mutual_information(summary: Summary) -> Array:
    """Gives the mutual information (N,) without its bias of first order in 1 / T, in nats.

    The entropy's expansion around the true mean gives E[H(estimate)] = H - sum_c se_c^2 / (2 p_c) + O(T^-2), with the
    standard error of each class's probability (Miller 1955 for counts). It holds where that error is small against
    p_c; where it is not, the correction stays finite: below (C - 1) / (2 T - 2) for independent passes.

    Raises:
        InputError: the summary is not a classifier's.
    """
    if summary.classes is None:
        raise InputError("mutual information needs a classifier; this summary has no classes")
    share = np.divide(summary.standard_error**2, summary.mean, out=np.zeros_like(summary.mean), where=summary.mean > 0)
    return np.asarray(summary.classes.mutual_information + share.sum(axis=-1) / 2, np.float64)


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
        deterministic=None if result.deterministic is None else result.deterministic[..., :width],
        samples=None if result.samples is None else result.samples[..., :width],
        support=support,
    )


def _all(count: int) -> int:
    return count


def _half(count: int) -> int:
    return count // 2


def _identity(outputs: Any) -> Any:
    return outputs


def _first_half(values: Array) -> Array:
    return values[..., : values.shape[-1] // 2]


def _read_regression(result: PassResult) -> Summary:
    return _basic(result, "regression")


def _split_gaussian(outputs: Array) -> Array:
    """Mean and log-variance channels (t, N, 2 D, ...) -> means and variances side by side on the last axis."""
    _check_gaussian(outputs.shape)
    mean, log_variance = np.split(outputs, 2, axis=2)
    return np.concatenate([mean, np.exp(log_variance)], axis=-1)


def _with_log_variance(values: Array) -> Array:
    """Means and log-variances, as the head gave them: the variances themselves may be too large for its type."""
    mean, variance = np.split(values, 2, axis=-1)
    with np.errstate(divide="ignore"):  # of one that is 0
        return np.concatenate([mean, np.log(variance)], axis=-1)


def _split_gaussian_there(outputs: "Tensor") -> "Tensor":
    _check_gaussian(outputs.shape)
    mean, log_variance = outputs.double().chunk(2, dim=2)
    return _beside(mean, log_variance.exp())


def _check_gaussian(shape: tuple[int, ...]) -> None:
    channels = shape[2] if len(shape) > 2 else 1
    if channels % 2:
        raise InputError(
            "a gaussian network gives means and log-variances side by side, an even number of outputs; "
            f"this one gives {channels}"
        )


def _read_gaussian(result: PassResult) -> Summary:
    half = result.mean.shape[-1] // 2
    summary = _basic(result, "gaussian", aleatoric=result.mean[..., half:])
    return replace(summary, log_noise=None if result.samples is None else result.samples[..., half:])


@np.errstate(invalid="ignore")
def _class_statistics(outputs: Array) -> Array:
    """Logits (t, N, C, ...) -> probabilities, one vote for the largest, and the pass's entropy: (t, N, ..., 2C + 1).

    A logit of -inf is a probability of 0; where one is +inf or NaN, all are NaN.
    """
    _check_classes(outputs.shape)
    chances = softmax(np.moveaxis(outputs, 2, -1), axis=-1)
    votes = np.zeros_like(chances)
    np.put_along_axis(votes, chances.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
    return np.concatenate([chances, votes, entr(chances).sum(axis=-1, keepdims=True)], axis=-1)


def _class_statistics_there(outputs: "Tensor") -> "Tensor":
    _check_classes(outputs.shape)
    chances = outputs.double().movedim(2, -1).softmax(-1)
    votes = chances.new_zeros(chances.shape).scatter_(-1, chances.argmax(-1, keepdim=True), 1.0)
    return _beside(chances, votes, -chances.xlogy(chances).sum(-1, keepdim=True))


def _check_classes(shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or shape[2] < 2:
        raise InputError("a classifier gives one logit for each class, at least two; this network gives one output")


def _beside(*parts: "Tensor") -> "Tensor":
    """Puts tensors side by side on the last axis; by their own methods, since torch takes long to import."""
    together = parts[0].new_empty((*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)))
    start = 0
    for part in parts:
        together[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    return together


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
        variation_ratio=np.where(np.isnan(expected), np.nan, 1 - votes.max(axis=-1)),  # NaN votes for none
    )
    summary = _basic(result, "classification", support=(0.0, 1.0))
    return replace(summary, classes=classes)


TASKS: dict[str, Task] = {
    "classification": Task(
        Statistics(_class_statistics, _class_statistics_there, _half, kept=_first_half), _read_classes
    ),
    "gaussian": Task(
        Statistics(_split_gaussian, _split_gaussian_there, _half, kept=_with_log_variance), _read_gaussian
    ),
    "regression": Task(Statistics(_identity, _identity, _all, kept=_identity), _read_regression),
}
