"""Operations that stay whole in a captured program: what vmap would take apart, and what knows its own sample axis.

While a network is captured, a call of one of these functions becomes one node. Batched over the passes it is still one
node, on an input with one more leading axis; ``RUN`` says how such a node is computed. To keep another function whole,
add an operator and one line to ``RUN`` here, and its rule to ``kernel_rules``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.attention import ATTENTION, run_attention
from mcdrop.convolve import conv_together, folded, run_conv
from mcdrop.each_pass import EACH_PASS, each_pass, run_each_pass
from mcdrop.recurrent import run_layer
from mcdrop.sequences import over_passes

__all__ = [
    "BATCH_NORM", "CAT", "CONV", "LAYER_NORM", "LINEAR", "MATMUL", "RECURRENT", "RUN", "by_row"
]  # fmt: skip

_CALLS: dict[str, Callable[..., Tensor]] = {}  # by what they do, since an operator takes no functions
_FEW = 2  # rows of a stand-in


@torch.library.custom_op("mcdrop::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_batched(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    """One more axis in front is all that a linear layer needs, unless its weights differ from pass to pass."""
    if dims[1] is None and dims[2] is None:
        return _linear(x.movedim(dims[0], 0), weight, bias), 0
    count = info.batch_size
    x = x.expand(count, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
    weight = weight.expand(count, *weight.shape) if dims[1] is None else weight.movedim(dims[1], 0)
    flat = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    output = torch.bmm(flat, weight.transpose(1, 2))  # matmul ties sizes to those of today in some versions
    if bias is not None:
        output = output + (bias if dims[2] is None else bias.movedim(dims[2], 0).unsqueeze(1))
    return (output.unflatten(1, x.shape[1:-1]) if x.dim() > 2 else output.squeeze(1)), 0


@torch.library.custom_op("mcdrop::conv", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return run_conv(x, weight, bias, stride, padding, dilation, groups)


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    inner = weight.dim() - 2
    sizes = [
        (x.shape[i - inner] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(inner)
    ]
    return x.new_empty((*x.shape[: -inner - 1], weight.shape[0], *sizes))


@torch.library.custom_op("mcdrop::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, leading: int
) -> Tensor:
    return _run_batch_norm(x, mean, variance, weight, bias, eps, leading)


@_batch_norm.register_fake
def _(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, leading: int
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mcdrop::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


@_layer_norm.register_fake
def _(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mcdrop::by_row", mutates_args=())
def _by_row(rows: Sequence[Tensor], weights: Sequence[Tensor], call: str, leading: int) -> Tensor:
    return _run_by_row(rows, weights, call, leading)


@_by_row.register_fake
def _(rows: Sequence[Tensor], weights: Sequence[Tensor], call: str, leading: int) -> Tensor:
    output = _CALLS[call](*(one.new_empty((_FEW, *one.shape[leading:])) for one in rows), *weights)
    if output.shape[0] != _FEW:
        raise NotImplementedError(f"{call} makes other rows")
    return output.new_empty((*rows[0].shape[:leading], *output.shape[1:]))


def _by_row_batched(
    info: Any, dims: Any, rows: Sequence[Tensor], weights: Sequence[Tensor], call: str, leading: int
) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1]):
        return each_pass(BY_ROW, _run_by_row, (rows, weights, call, leading), dims), 0
    return _by_row(_all_batched(info, dims[0], rows), [*weights], call, leading + 1), 0


def by_row(call: Callable[..., Tensor], name: str, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Keeps a call whole that is a function of each row alone.

    ``call`` takes the tensors that have rows in front, then those that are the same for all rows and passes; what it
    gives is new. Calls of one ``name`` do the same.
    """
    _CALLS[name] = call
    return _by_row([*rows], [*weights], name, 1)  # type: ignore[no-any-return]


@torch.library.custom_op("mcdrop::recurrent", mutates_args=())
def _recurrent(
    name: str, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, both_ways: bool,
    rows_first: bool,
) -> list[Tensor]:  # fmt: skip
    found = _run_recurrent(name, x, initial, weights, bias, both_ways, rows_first)
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in found]


@_recurrent.register_fake
def _(
    name: str, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, both_ways: bool,
    rows_first: bool,
) -> list[Tensor]:  # fmt: skip
    width = initial[0].shape[-1] * (2 if both_ways else 1)
    return [x.new_empty((*x.shape[:-1], width)), *(state.new_empty(state.shape) for state in initial)]


@torch.library.custom_op("mcdrop::cat", mutates_args=())
def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat([*tensors], axis)


@_cat.register_fake
def _(tensors: Sequence[Tensor], axis: int) -> Tensor:
    sizes = [*tensors[0].shape]
    sizes[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return tensors[0].new_empty(sizes)


def _cat_batched(info: Any, dims: Any, tensors: Sequence[Tensor], axis: int) -> tuple[Tensor, int]:
    """All get the sample axis; the axis is counted from the end, so that it stays the same."""
    return _cat(_all_batched(info, dims[0], tensors), axis), 0


@torch.library.custom_op("mcdrop::matmul", mutates_args=())
def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@_matmul.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    lead = [two if isinstance(one, int) and one == 1 else one for one, two in zip(x.shape, y.shape, strict=True)]
    return x.new_empty((*lead[:-2], x.shape[-2], y.shape[-1]))


def _matmul_batched(info: Any, dims: Any, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Both have the same axes, and get one more in front."""
    both = (one.unsqueeze(0) if dim is None else one.movedim(dim, 0) for one, dim in zip((x, y), dims, strict=True))
    return _matmul(*both), 0


def _recurrent_batched(
    info: Any, dims: Any, name: str, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], bias: bool,
    both_ways: bool, rows_first: bool,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """The passes are folded into the rows."""
    if any(dim is not None for dim in dims[3]):
        args = name, x, initial, weights, bias, both_ways, rows_first
        outputs = each_pass(RECURRENT, _run_recurrent, args, dims)
        return outputs, [0] * len(outputs)
    states = len(initial)

    def run(*each: Tensor) -> Sequence[Tensor]:
        found: list[Tensor] = _recurrent(name, each[0], [*each[1:]], [*weights], bias, both_ways, rows_first)
        return found

    outputs = over_passes(
        run, (x, *initial), (dims[1], *dims[2]), info.batch_size, states=states, rows_first=rows_first
    )
    return [*outputs], [0] * len(outputs)


def _all_batched(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gives all of them the sample axis in front."""
    return [
        tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _first_alone(operator: Any) -> Callable[..., tuple[Tensor, int]]:
    """A vmap rule for an operator whose first tensor alone mostly differs: it gets one more axis in front."""

    def rule(info: Any, dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in torch.utils._pytree.tree_leaves(dims[1:])):
            target = operator._opoverload
            return each_pass(target, RUN[target], (x, *rest), dims, conv_together if target is CONV else None), 0
        if operator is _batch_norm:
            rest = (*rest[:-1], rest[-1] + 1)
        return operator(x.movedim(dims[0], 0), *rest), 0

    return rule


_linear.register_vmap(_linear_batched)
_conv.register_vmap(_first_alone(_conv))
_batch_norm.register_vmap(_first_alone(_batch_norm))
_layer_norm.register_vmap(_first_alone(_layer_norm))
_cat.register_vmap(_cat_batched)
_recurrent.register_vmap(_recurrent_batched)
_matmul.register_vmap(_matmul_batched)
_by_row.register_vmap(_by_row_batched)

LINEAR = torch.ops.mcdrop.linear.default
CONV = torch.ops.mcdrop.conv.default
BY_ROW = torch.ops.mcdrop.by_row.default
BATCH_NORM = torch.ops.mcdrop.batch_norm.default
LAYER_NORM = torch.ops.mcdrop.layer_norm.default
CAT = torch.ops.mcdrop.cat.default
MATMUL = torch.ops.mcdrop.matmul.default
RECURRENT = torch.ops.mcdrop.recurrent.default


# -- how a node is computed -------------------------------------------------------------------------------------------


def _run_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Runs a linear layer on memory in order: torch takes ten times as long for a transposed input in bfloat16."""
    return F.linear(x.contiguous(), weight, bias)


def _run_batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, leading: int
) -> Tensor:
    return folded(
        x, x.dim() - 2 - leading, lambda flat: F.batch_norm(flat, mean, variance, weight, bias, False, 0.0, eps)
    )


def _run_by_row(rows: Sequence[Tensor], weights: Sequence[Tensor], call: str, leading: int) -> Tensor:
    if leading == 1:
        return _CALLS[call](*rows, *weights)
    flat = [one.flatten(0, leading - 1) for one in rows]
    output: Tensor = _CALLS[call](*flat, *weights).unflatten(0, rows[0].shape[:leading])
    return output


def _run_recurrent(
    name: str, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, both_ways: bool,
    rows_first: bool,
) -> Sequence[Tensor]:  # fmt: skip
    return run_layer(getattr(torch, name), x, initial, weights, bias, both_ways, rows_first)


RUN: dict[Any, Callable[..., Any]] = {
    ATTENTION: run_attention,
    CAT: torch.cat,
    EACH_PASS: run_each_pass,
    LINEAR: _run_linear,
    CONV: run_conv,
    BATCH_NORM: _run_batch_norm,
    BY_ROW: _run_by_row,
    LAYER_NORM: F.layer_norm,
    MATMUL: torch.matmul,
    RECURRENT: _run_recurrent,
}
