"""Functions of each row alone, which a capture keeps whole: layers between images, reads and writes within a row.

The passes are folded into the rows. To add a function, add it to a table; what comes out is compared with the loop.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.intercept import Interception, Rules
from mcdrop.kernels import by_row

__all__ = ["ROW_RULES", "by_row_rule"]


def by_row_rule(function: Callable[..., Any], tensors: int = 1, result: int | None = None) -> Callable[..., Tensor]:
    """A function of each row alone, whose first ``tensors`` tensors have the rows in front; others are weights.

    Of what it gives, the tensor of a number is taken.
    """

    def rule(mode: Interception, /, *args: Any, **named: Any) -> Tensor:
        values, names = [*args, *named.values()], [*named]
        holes = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        given = [values[place] for place in holes]
        values = [None if isinstance(value, Tensor) else value for value in values]
        counted = any(isinstance(leaf, torch.SymInt) for leaf in torch.utils._pytree.tree_leaves(values))
        # as text: two numbers of rows that are compared may count as equal from then on
        if counted or len({str(one.shape[:1]) for one in given[:tensors]}) > 1:
            return function(*args, **named)  # type: ignore[no-any-return]

        def call(*each: Tensor) -> Any:
            filled = [*values]
            for place, tensor in zip(holes, each, strict=True):
                filled[place] = tensor
            found = function(*filled[: len(args)], **dict(zip(names, filled[len(args) :], strict=True)))
            return found if result is None else found[result]

        name = f"{function.__name__} {result} {values} {names} {holes}"
        return by_row(call, name, given[:tensors], given[tensors:])

    return rule


def _with_indices_rule(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A pool that also says where its largest numbers stood; run twice, since a kept call gives one tensor."""
    both = by_row_rule(function, result=0), by_row_rule(function, result=1)

    def rule(mode: Interception, /, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        largest, places = (one(mode, *args, **named) for one in both)
        return largest, places

    return rule


def _along_rule(function: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """Reads or writes by indices within each row."""
    whole = by_row_rule(function, tensors)

    def rule(mode: Interception, input: Tensor, dim: int, *others: Any, **named: Any) -> Tensor:
        if dim in (0, -input.dim()):
            return function(input, dim, *others, **named)
        return whole(mode, input, dim, *others, **named)

    return rule


def _written_rule(function: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """Writes by indices within each row, over the tensor that is given."""
    fresh = _along_rule(function, tensors)

    def rule(mode: Interception, input: Tensor, *others: Any, **named: Any) -> Tensor:
        return mode.write(input, fresh(mode, input, *others, **named))

    return rule


def _instance_norm_rule(
    mode: Interception, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, *others: Any, **named: Any,
) -> Tensor:  # fmt: skip
    given = (input, running_mean, running_var, weight, bias, use_input_stats, *others)
    if use_input_stats and running_mean is not None:  # which is moved on
        return F.instance_norm(*given, **named)
    return _INSTANCE_NORM(mode, *given, **named)


_INSTANCE_NORM = by_row_rule(F.instance_norm)
_BY_ROW = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.channel_shuffle, F.conv_transpose1d,
    F.conv_transpose2d, F.conv_transpose3d, F.fold, F.interpolate, F.local_response_norm, F.lp_pool1d, F.lp_pool2d,
    F.lp_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pad, F.pixel_shuffle, F.pixel_unshuffle, F.unfold,
    torch.fft.fft, torch.fft.fft2, torch.fft.ifft, torch.fft.ifft2, torch.fft.irfft, torch.fft.irfft2, torch.fft.rfft,
    torch.fft.rfft2, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip
_OF_TWO = (F.bilinear, F.grid_sample, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
_ALONG = {"gather": 2, "index_select": 1, "scatter": 3, "scatter_add": 3}
_WITH_INDICES = (
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
)  # fmt: skip
# What exported programs call instead, by the number of tensors that have the rows in front.
_OPERATORS = {
    1: (
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "channel_shuffle", "col2im", "conv1d.padding", "conv2d.padding", "conv3d.padding", "conv_transpose1d",
        "conv_transpose2d.input", "conv_transpose3d.input", "fft_fft", "fft_fft2", "fft_ifft", "fft_ifft2", "fft_irfft",
        "fft_irfft2", "fft_rfft", "fft_rfft2", "im2col", "max_pool1d", "max_pool2d", "max_pool3d", "pad",
        "pixel_shuffle", "pixel_unshuffle", "upsample_bicubic2d.vec", "upsample_bilinear2d.vec",
        "upsample_linear1d.vec", "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
        "upsample_trilinear3d.vec",
    ),
    2: ("bilinear", "grid_sampler", "max_unpool2d", "max_unpool3d"),
}  # fmt: skip
_OPERATORS_WITH_INDICES = (
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices",
    "max_pool2d_with_indices", "max_pool3d_with_indices",
)  # fmt: skip
_OPERATORS_ALONG = {"gather": 2, "index_select": 1, "scatter.src": 3, "scatter.value": 2, "scatter_add": 3}


def _operator(name: str) -> Any:
    """One of torch's operators, by its name and overload."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


ROW_RULES: Rules = {
    **{function: by_row_rule(function) for function in _BY_ROW},
    **{function: by_row_rule(function, tensors=2) for function in _OF_TWO},
    **{function: _with_indices_rule(function) for function in _WITH_INDICES},
    **{getattr(torch, name): _along_rule(getattr(torch, name), tensors) for name, tensors in _ALONG.items()},
    **{getattr(Tensor, name): _along_rule(getattr(torch, name), tensors) for name, tensors in _ALONG.items()},
    Tensor.scatter_: _written_rule(torch.scatter, 3),
    Tensor.scatter_add_: _written_rule(torch.scatter_add, 3),
    F.instance_norm: _instance_norm_rule,
    **{one: by_row_rule(one, n) for n, names in _OPERATORS.items() for one in map(_operator, names)},
    **{one: _with_indices_rule(one) for one in map(_operator, _OPERATORS_WITH_INDICES)},
    **{(one := _operator(name)): _along_rule(one, tensors) for name, tensors in _OPERATORS_ALONG.items()},
}
