"""Mean, variance and bounds of all passes in ONNX operators: the formulas of moments, summaries and intervals.

What an operator does is up to the ``Operators``: they write nodes of a graph, or compute with tensors. Numbers are in
the network's own type, or in float32 where that is narrower. Moments are of differences from the first pass, as those
of ``moments`` are, because a spread loses its digits beside a large mean.

To let a graph hold another interval, add one function and one line to ``BOUNDS``; for another task, one to ``READERS``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import special

from mcdrop.blocks import Blocks, Share, shares
from mcdrop.errors import InputError, UnknownName
from mcdrop.masks import BLOCKS

__all__ = ["BOUNDS", "BY_PLACE", "READERS", "Operators", "statistics"]

BY_PLACE = ("entropy", "expected_entropy", "label", "mutual_information", "variation_ratio")  # not one for each class

_TINY = float(np.finfo(np.float32).tiny)


class Operators(Protocol):
    """ONNX operators by name, on values that are names or tensors."""

    def constant(self, value: Any, dtype: Any = None) -> Any:
        """Gives a constant; None is the type of the numbers."""

    def real(self, value: Any) -> Any:
        """Gives a value in the type of the numbers."""

    def whole(self, *numbers: int) -> Any:
        """Gives a list of whole numbers, as shapes and axes are."""

    def node(self, operator: str, *inputs: Any, output: str | None = None, **attributes: Any) -> Any:
        """Gives what an operator makes."""

    def reshaped(self, value: Any, *shape: int) -> Any:
        """Gives a value in another shape; -1 is what is left."""

    def ranked(self, value: Any, rank: int, *, largest: bool) -> Any:
        """Gives the rank-th smallest or largest over the first axis."""


@dataclass(frozen=True)
class _Gathered:
    """Values that hold the moments of a value (T, N, ...) over the passes."""

    values: Any
    mean: Any
    variance: Any
    standard_error: Any
    degrees: int
    passes: int


def statistics(
    builder: Operators, values: Any, shape: tuple[int, ...], *, task: str, passes: int, sampler: str, level: float,
    interval: str,
) -> dict[str, Any]:  # fmt: skip
    """Gives the values of the graph that hold the posterior, by what they are called.

    Args:
        builder: of the graph.
        values: all passes, (T, N, ...).
        shape: of one row's output.
        task: one of ``READERS``.
        passes: T.
        sampler: of the masks.
        level: of the interval.
        interval: one of ``BOUNDS``.

    Raises:
        UnknownName: a graph cannot hold this interval.
    """
    if interval not in BOUNDS:
        raise UnknownName("interval of an exported graph", interval, BOUNDS)
    read = READERS[task](builder, values, shape, passes, BLOCKS[sampler])
    gathered, noise = read.gathered, read.more.get("aleatoric")
    lower, upper = BOUNDS[interval](builder, gathered, noise, level)
    if read.support is not None:
        low, high = (builder.constant(edge) for edge in read.support)
        lower, upper = builder.node("Clip", lower, low, high), builder.node("Clip", upper, low, high)
    total = gathered.variance if noise is None else builder.node("Add", gathered.variance, noise)
    head = {"mean": gathered.mean, "variance": total, "lower": lower, "upper": upper}
    return {**head, "standard_error": gathered.standard_error, **read.more}


def _gather(builder: Operators, values: Any, shape: tuple[int, ...], passes: int, blocks: Blocks) -> _Gathered:
    """Moments over the passes as ``moments.Gathered`` has them, for such blocks."""
    axis = builder.whole(0)
    first = builder.node("Slice", values, axis, builder.whole(1), axis)
    apart = builder.node("Sub", values, first)
    off = _mean_of(builder, apart, 0)
    mean = builder.node("Add", builder.reshaped(first, -1, *shape), off)
    squares = builder.node("ReduceSumSquare", builder.node("Sub", apart, off), axis, keepdims=0)
    told, left = shares(passes, blocks)
    errors = [
        _times(
            builder,
            _spread(builder, apart, shape, share),
            share.number / (share.whole - 1) * (share.size / passes) ** 2,
        )
        for share in told
    ]
    if left:
        errors.append(_times(builder, squares, left / (passes - 1) / passes**2))
    error = errors[0] if len(errors) == 1 else builder.node("Sum", *errors)
    variance = builder.node("Add", _times(builder, squares, 1 / passes), error)
    degrees = (told[0].whole if told else passes) - 1
    return _Gathered(values, mean, variance, builder.node("Sqrt", error), degrees, passes)


def _spread(builder: Operators, values: Any, shape: tuple[int, ...], share: Share) -> Any:
    """Summed squared deviations of the means of whole blocks from their mean."""
    axis, end = builder.whole(0), builder.whole(share.begin + share.whole * share.size)
    members = builder.node("Slice", values, builder.whole(share.begin), end, axis)
    means = _mean_of(builder, builder.reshaped(members, share.whole, share.size, -1, *shape), 1)
    off = builder.node("Sub", means, _mean_of(builder, means, 0))
    return builder.node("ReduceSumSquare", off, axis, keepdims=0)


def _mean_of(builder: Operators, value: Any, axis: int) -> Any:
    return builder.node("ReduceMean", value, builder.whole(axis), keepdims=0)


def _times(builder: Operators, value: Any, factor: float) -> Any:
    return builder.node("Mul", value, builder.constant(factor))


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """The mean function's moments, what else a task tells, and where the mean function can lie."""

    gathered: _Gathered
    more: dict[str, Any]
    support: tuple[float, float] | None = None


def _regression(builder: Operators, values: Any, shape: tuple[int, ...], passes: int, blocks: Blocks) -> _Read:
    return _Read(_gather(builder, values, shape, passes, blocks), {})


def _gaussian(builder: Operators, values: Any, shape: tuple[int, ...], passes: int, blocks: Blocks) -> _Read:
    """Means and log-variances are the halves of axis 2 of (T, N, 2 D, ...)."""
    half = shape[0] // 2
    ends = [builder.whole(0), builder.whole(half), builder.whole(2 * half)]
    first = builder.node("Slice", values, ends[0], ends[1], builder.whole(2))
    second = builder.node("Slice", values, ends[1], ends[2], builder.whole(2))
    gathered = _gather(builder, first, (half, *shape[1:]), passes, blocks)
    noise = _mean_of(builder, builder.node("Exp", second), 0)
    return _Read(gathered, {"epistemic": gathered.variance, "aleatoric": noise})


def _classification(builder: Operators, values: Any, shape: tuple[int, ...], passes: int, blocks: Blocks) -> _Read:
    """Logits (T, N, C, ...) to probabilities, their entropies and votes."""
    if len(shape) > 1:
        order = [0, 1, *range(3, len(shape) + 2), 2]
        values, shape = builder.node("Transpose", values, perm=order), (*shape[1:], shape[0])
    chances = builder.node("Softmax", values, axis=-1)
    gathered = _gather(builder, chances, shape, passes, blocks)
    entropy = _entropy(builder, gathered.mean)
    expected = _mean_of(builder, _entropy(builder, chances), 0)
    votes = builder.node(  # in float32, the only type of them that onnxruntime has
        "OneHot", builder.node("ArgMax", chances, axis=-1, keepdims=0), builder.whole(shape[-1]),
        builder.constant([0.0, 1.0], np.float32), axis=-1,
    )  # fmt: skip
    share = builder.node("ReduceMax", _mean_of(builder, builder.real(votes), 0), builder.whole(-1), keepdims=0)
    # 1, and NaN where a pass has no probabilities: it votes for none
    whole = builder.node("Add", builder.constant(1.0), _times(builder, expected, 0.0))
    information = builder.node("Relu", builder.node("Sub", entropy, expected))
    more = {
        "label": builder.node("ArgMax", gathered.mean, axis=-1, keepdims=0),
        "entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": information,
        "variation_ratio": builder.node("Sub", whole, share),
    }
    return _Read(gathered, more, (0.0, 1.0))


def _entropy(builder: Operators, chances: Any) -> Any:
    logarithm = builder.node("Log", builder.node("Max", chances, builder.constant(_TINY)))
    total = builder.node("ReduceSum", builder.node("Mul", chances, logarithm), builder.whole(-1), keepdims=0)
    return builder.node("Neg", total)


READERS: dict[str, Callable[[Operators, Any, tuple[int, ...], int, Blocks], _Read]] = {
    "classification": _classification,
    "gaussian": _gaussian,
    "regression": _regression,
}


# -- intervals ---------------------------------------------------------------------------------------------------------

Bounds = tuple[Any, Any]


def _around(builder: Operators, centre: Any, deviation: Any, factor: float) -> Bounds:
    half = _times(builder, deviation, factor)
    return builder.node("Sub", centre, half), builder.node("Add", centre, half)


def _mean(builder: Operators, found: _Gathered, noise: Any, level: float) -> Bounds:
    factor = float(special.stdtrit(found.degrees, 0.5 + level / 2))
    return _around(builder, found.mean, found.standard_error, factor)


def _normal(builder: Operators, found: _Gathered, noise: Any, level: float) -> Bounds:
    return _around(builder, found.mean, builder.node("Sqrt", found.variance), float(special.ndtri(0.5 + level / 2)))


def _student_t(builder: Operators, found: _Gathered, noise: Any, level: float) -> Bounds:
    factor = float(special.stdtrit(found.passes - 1, 0.5 + level / 2)) * math.sqrt(1 + 1 / found.passes)
    return _around(builder, found.mean, builder.node("Sqrt", found.variance), factor)


def _predictive(builder: Operators, found: _Gathered, noise: Any, level: float) -> Bounds:
    if noise is None:
        raise InputError("interval 'predictive' of an exported graph needs a network with a log-variance head")
    total = builder.node("Sqrt", builder.node("Add", found.variance, noise))
    return _around(builder, found.mean, total, float(special.ndtri(0.5 + level / 2)))


def _quantile(builder: Operators, found: _Gathered, noise: Any, level: float) -> Bounds:
    rank = math.floor(round((found.passes + 1) * (1 - level) / 2, 9))
    if rank < 1:
        needed = math.ceil(round(2 / (1 - level) - 1, 6))
        raise InputError(f"interval 'quantile' at level {level:g} needs at least {needed} passes, got {found.passes}")
    lower, upper = (builder.ranked(found.values, rank, largest=largest) for largest in (False, True))
    return lower, upper


BOUNDS: dict[str, Callable[[Operators, _Gathered, Any, float], Bounds]] = {
    "mean": _mean,
    "normal": _normal,
    "predictive": _predictive,
    "quantile": _quantile,
    "student_t": _student_t,
}
