"""Layers as oneDNN runs them on a CPU: weights packed once, and what follows a layer done while it is in the cache.

These are operations of torch that its own compiler writes; they are nodes of a program and are never captured.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from mcdrop.convolve import folded
from mcdrop.locks import new_lock

__all__ = [
    "FLOPS",
    "IN_PLACE",
    "NARROW",
    "ONEDNN",
    "Packed",
    "available",
    "channels_put_last",
    "conv",
    "conv_add_relu",
    "conv_add_relu_",
    "linear",
    "narrow",
]

NARROW = range(5, 17)  # units; of fewer MKL's product is as fast, and more fill the registers that it computes with
_IMAGE = 2  # axes of what is convolved
_MANY_ROWS = 1024
_MOST_SIZES = 3  # that a weight is kept for: those of rows, of a chunk of passes, and of the last one


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether layers of a type are run so on a device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Packed:
    """A convolution's weight in the orders that it is read in fastest: another one for each size of what it convolves.

    An order that was chosen for other sizes can take twenty times as long, on processors without AVX-512.
    """

    def __init__(
        self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> None:
        """Takes the weight, and how it is convolved with."""
        self._weight, self._how = weight.detach().contiguous(), (padding, stride, dilation, groups)
        self._held: dict[torch.Size, Tensor] = {}
        self._turn = new_lock()

    def of(self, x: Tensor) -> Tensor:
        """Gives the weight for an input; of no use to anything else."""
        held = self._held.get(x.shape)
        if held is not None:
            return held
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self._weight, *self._how, x.shape)
        with self._turn:
            if len(self._held) >= _MOST_SIZES:
                self._held.pop(next(iter(self._held)))
            self._held[x.shape] = made
        return made


def conv(
    x: Tensor, weight: Packed, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, then: str,
) -> Tensor:  # fmt: skip
    """A convolution of images (..., N, C, H, W) with a packed weight, and then "relu" or "none"."""

    def run(x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            channels_put_last(x), weight.of(x), bias, padding, stride, dilation, groups, then, [], ""
        )
        return output

    return folded(x, _IMAGE, run)


def conv_add_relu(other: Tensor, x: Tensor, *how: Any) -> Tensor:
    """A convolution as in ``conv``, added to a tensor of its output's shape and cut off below 0.

    Raises:
        RuntimeError: the other tensor has another number of images, past whose end oneDNN would read.
    """
    if other.shape[: -1 - _IMAGE] != x.shape[: -1 - _IMAGE]:
        raise RuntimeError(f"a sum of images {tuple(x.shape)} takes as many others, got {tuple(other.shape)}")
    run = torch.ops.mkldnn._convolution_pointwise.binary
    return folded(x, _IMAGE, lambda flat: run(channels_put_last(flat), _flat(other), *_sum(flat, *how)))


def conv_add_relu_(other: Tensor, x: Tensor, *how: Any) -> Tensor:
    """The same, written over the other tensor."""
    run = torch.ops.mkldnn._convolution_pointwise_.binary
    return folded(x, _IMAGE, lambda flat: run(_flat(other), channels_put_last(flat), *_sum(flat, *how)))


def _sum(
    x: Tensor, weight: Packed, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> tuple[Any, ...]:  # fmt: skip
    """What both are asked for besides, in oneDNN's order."""
    return weight.of(x), bias, padding, stride, dilation, groups, "add", 1.0, "relu", [], ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    """A linear layer, its bias added as it is written, and then "relu" or "none"."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, then, [], "")
    return output


def narrow(x: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
    """A product of a matrix with a turned weight of few units, and its bias: by oneDNN where there are many rows.

    From 1024 rows on that took 0.4 to 0.9 of the time of MKL's product on an EPYC, below more.
    """
    if len(x) >= _MANY_ROWS:
        return linear(x, turned.t(), bias, "none")
    product = torch.mm(x, turned)
    return product if bias is None else product.add_(bias)


def channels_put_last(x: Tensor) -> Tensor:
    """Gives images, or a convolution's weight, with the channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def _flat(x: Tensor) -> Tensor:
    return channels_put_last(x.reshape(-1, *x.shape[-1 - _IMAGE :]))


ONEDNN = frozenset({Packed, conv, conv_add_relu, conv_add_relu_, linear, narrow})
IN_PLACE = {conv_add_relu: conv_add_relu_}


def _conv_flops(one: Any, two: Any, three: Any, *_: Any, out_shape: Any) -> int:
    """Counts from the shapes of image and weight; with a sum the other tensor stands before or between them."""
    image, weight = (one, two) if three is None or len(three) == 1 else (two if one == out_shape else one, three)
    count: int = conv_flop_count(image, weight, out_shape)
    return count


def _linear_flops(_x: Any, weight: Any, *_: Any, out_shape: Any) -> int:
    count: int = 2 * math.prod(out_shape) * weight[-1]
    return count


_COUNTS: dict[str, Callable[..., int]] = {
    "_convolution_pointwise": _conv_flops,
    "_convolution_pointwise_": _conv_flops,
    "_linear_pointwise": _linear_flops,
}
# What torch's counter of operations does not know of them, by operation; a torch without oneDNN has none of them.
FLOPS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.mkldnn, name): count for name, count in _COUNTS.items() if torch.backends.mkldnn.is_available()
}
