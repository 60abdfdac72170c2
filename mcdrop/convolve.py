"""Convolutions of many passes at once: folded into the rows, or into the channels where weights differ too."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["conv_together", "folded", "run_conv"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_IMAGE = 4  # axes of the weight of what is convolved with images
_FEW = (
    4  # rows up to which a CPU takes less time for all passes at once than for each on its own, up to five times less
)


def folded(x: Tensor, inner: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Gives a function of (rows, channels, ...) of an input with further leading axes, folded into the rows."""
    lead = x.shape[: x.dim() - inner - 1]
    if len(lead) == 1:
        return run(x)
    output = run(x.reshape(math.prod(lead), *x.shape[len(lead) :]))
    return output.reshape(*lead, *output.shape[1:])


def run_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Runs a convolution whose weights are the same for all that leads."""
    run = _CONVOLUTIONS[weight.dim()]
    if weight.dim() == _IMAGE and weight.is_cpu:  # pools of what comes out take a tenth of the time
        weight = weight.contiguous(memory_format=torch.channels_last)
    return folded(x, weight.dim() - 2, lambda flat: run(flat, weight, bias, stride, padding, dilation, groups))


def conv_together(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor | None:  # fmt: skip
    """Runs a convolution whose weights have the passes in front, as input and bias may, as one of all their channels.

    None where the passes are better run one after the other.
    """
    inner = len(stride)
    passes, rows = len(weight), x.shape[-inner - 2]
    if weight.dim() != inner + 3 or (rows > _FEW and weight.is_cpu):
        return None
    if bias is not None:
        bias = bias.expand(passes, bias.shape[-1]).flatten()
    if x.dim() == inner + 3 or groups > 1:
        x = (x if x.dim() == inner + 3 else x.expand(passes, *x.shape)).movedim(0, 1).flatten(1, 2)
        groups *= passes
    run = _CONVOLUTIONS[inner + 2]
    output = run(x, weight.flatten(0, 1), bias, stride, padding, dilation, groups)
    opened: Tensor = output.unflatten(1, (passes, -1))
    return opened.movedim(1, 0)
