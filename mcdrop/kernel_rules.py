"""Which calls a capture keeps whole: each becomes one node of the graph, one of ``kernels``.

What a rule does not cover (a convolution of a single image, say) runs as it is and is taken apart by vmap.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.attention import ATTENTION, in_groups
from mcdrop.intercept import Interception, Rules
from mcdrop.kernels import BATCH_NORM, CAT, CONV, LAYER_NORM, LINEAR, MATMUL, RECURRENT, by_row
from mcdrop.rules import RULES
from mcdrop.sequences import recurrent_rule

__all__ = ["KERNEL_RULES"]


def _linear_rule(mode: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = LINEAR(input, weight, bias)
    return output


def _each(value: Any, inner: int) -> list[int]:
    return [value] * inner if isinstance(value, int) else [*value] * (inner if len(value) == 1 else 1)


def _conv_rule(function: Callable[..., Tensor], inner: int) -> Callable[..., Tensor]:
    whole = _by_row_rule(function)

    def rule(
        mode: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        if input.dim() != inner + 2:
            return function(input, weight, bias, stride, padding, dilation, groups)
        if isinstance(padding, str):
            room = [(size - 1) * step for size, step in zip(weight.shape[2:], _each(dilation, inner), strict=True)]
            if padding == "same" and any(one % 2 for one in room):  # one side gets more
                return whole(mode, input, weight, bias, stride, padding, dilation, groups)
            padding = [one // 2 for one in room] if padding == "same" else 0
        each = (_each(value, inner) for value in (stride, padding, dilation))
        output: Tensor = CONV(input, weight, bias, *each, groups)
        return output

    return rule


def _batch_norm_rule(
    mode: Interception, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    output: Tensor = BATCH_NORM(input, running_mean, running_var, weight, bias, eps, 0)
    return output


def _layer_norm_rule(
    mode: Interception, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    output: Tensor = LAYER_NORM(input, [*normalized_shape], weight, bias, eps)
    return output


def _group_norm_rule(
    mode: Interception, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Groups of channels as layers of their own, each channel scaled and moved afterwards."""
    if input.dim() < 2 or input.shape[1] % num_groups:
        return F.group_norm(input, num_groups, weight, bias, eps)
    size = math.prod(input.shape[1:]) // num_groups
    output: Tensor = LAYER_NORM(input.reshape(-1, num_groups, size), [size], None, None, eps).reshape(input.shape)
    channels = (-1, *(1,) * (input.dim() - 2))
    output = output if weight is None else output * weight.reshape(channels)
    return output if bias is None else output + bias.reshape(channels)


def _by_row_rule(function: Callable[..., Any], tensors: int = 1, result: int | None = None) -> Callable[..., Tensor]:
    """A function of each row alone, whose first ``tensors`` tensors have the rows in front; others are weights.

    Of what it gives, the tensor of a number is taken.
    """

    def rule(mode: Interception, /, *args: Any, **named: Any) -> Tensor:
        values, names = [*args, *named.values()], [*named]
        holes = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        given = [values[place] for place in holes]
        values = [None if isinstance(value, Tensor) else value for value in values]
        if any(isinstance(leaf, torch.SymInt) for leaf in torch.utils._pytree.tree_leaves(values)):
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
    """A pool that also says where its largest numbers stood."""
    both = _by_row_rule(function, result=0), _by_row_rule(function, result=1)

    def rule(mode: Interception, /, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        largest, places = (one(mode, *args, **named) for one in both)
        return largest, places

    return rule


def _along_rule(function: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """Reads or writes by indices within each row."""
    whole = _by_row_rule(function, tensors)

    def rule(mode: Interception, input: Tensor, dim: int, *others: Any, **named: Any) -> Tensor:
        given = [input, *(one for one in (*others, *named.values()) if isinstance(one, Tensor))][:tensors]
        # as text: two numbers of rows that are compared may count as equal from then on
        if dim in (0, -input.dim()) or len({str(one.shape[:1]) for one in given}) > 1:
            return function(input, dim, *others, **named)
        return whole(mode, input, dim, *others, **named)

    return rule


def _instance_norm_rule(
    mode: Interception, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, *others: Any, **named: Any,
) -> Tensor:  # fmt: skip
    given = (input, running_mean, running_var, weight, bias, use_input_stats, *others)
    if use_input_stats and running_mean is not None:  # which is moved on
        return F.instance_norm(*given, **named)
    return _INSTANCE_NORM(mode, *given, **named)


def _cat_rule(
    mode: Interception, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None, **others: Any
) -> Tensor:
    dim = dim if axis is None else axis
    if len({tensor.dim() for tensor in tensors}) > 1:  # as caches of keys begin with; torch leaves them out too
        tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    first = tensors[0]
    if others or any(tensor.dtype != first.dtype or tensor.dim() != first.dim() for tensor in tensors):
        return torch.cat([*tensors], dim, **others)
    output: Tensor = CAT([*tensors], dim - first.dim() if dim >= 0 else dim)
    return output


def _activation_rule(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An activation that may write over its input, which torch's tracers take for few of them."""
    signature = inspect.signature(function)

    def rule(mode: Interception, *args: Any, **named: Any) -> Tensor:
        given = signature.bind(*args, **named).arguments
        if not given.pop("inplace", False):
            return function(**given)
        x: Tensor = given["input"]
        return x.copy_(function(**given))

    return rule


def _number_rule(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Arithmetic with a number that counts rows, which torch's vmap does not take for a number."""

    def rule(mode: Interception, input: Tensor, other: Any, *others: Any, **named: Any) -> Tensor:
        if isinstance(other, torch.SymInt):
            other = torch.scalar_tensor(other, dtype=torch.int64, device=input.device)  # type: ignore[arg-type]
        return function(input, other, *others, **named)

    return rule


def _matmul_rule(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Products of equally many matrices; torch 2.11 ties those that vmap takes apart to the number of rows."""

    def rule(mode: Interception, input: Tensor, *others: Any, **named: Any) -> Tensor:
        other = *others, *(named[name] for name in ("other", "mat2") if name in named)
        if len(other) != 1 or len(others) + len(named) != 1 or input.dim() != other[0].dim() or input.dim() < 3:
            return function(input, *others, **named)
        output: Tensor = MATMUL(input, other[0])
        return output

    return rule


def _attention_rule(
    mode: Interception, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention without a draw."""
    if dropout_p or not 3 <= query.dim() == key.dim() == value.dim():
        with_draws: Any = RULES[F.scaled_dot_product_attention]
        return with_draws(  # type: ignore[no-any-return]
            mode, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = in_groups(query, key, value)
    output: Tensor = ATTENTION(query, key, value, attn_mask, is_causal, scale)
    return output


def _layer(
    function: Callable[..., Any], bias: bool, both_ways: bool, rows_first: bool, states: int, *tensors: Tensor
) -> list[Tensor]:
    """One recurrent layer as one node."""
    initial, weights = [*tensors[1 : 1 + states]], [*tensors[1 + states :]]
    outputs: list[Tensor] = RECURRENT(function.__name__, tensors[0], initial, weights, bias, both_ways, rows_first)
    return outputs


_INSTANCE_NORM = _by_row_rule(F.instance_norm)
_BY_ROW = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.channel_shuffle, F.conv_transpose1d,
    F.conv_transpose2d, F.conv_transpose3d, F.fold, F.interpolate, F.local_response_norm, F.lp_pool1d, F.lp_pool2d,
    F.lp_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pad, F.pixel_shuffle, F.pixel_unshuffle, F.unfold,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip
_OF_TWO = (F.grid_sample, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
_ALONG: dict[Any, int] = {torch.gather: 2, torch.index_select: 1, torch.scatter: 3, torch.scatter_add: 3}
_WITH_INDICES = (
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
)  # fmt: skip
_ARITHMETIC = (
    Tensor.__mul__, Tensor.__rdiv__, Tensor.__rmul__, Tensor.__truediv__, Tensor.div, Tensor.mul, torch.div, torch.mul
)  # fmt: skip
_ACTIVATIONS = (
    F.celu, F.elu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu6, F.selu, F.silu, F.threshold
)  # fmt: skip

KERNEL_RULES: Rules = {
    **RULES,
    **{function: _activation_rule(function) for function in _ACTIVATIONS},
    **{function: _by_row_rule(function) for function in _BY_ROW},
    **{function: _by_row_rule(function, tensors=2) for function in _OF_TWO},
    **{function: _with_indices_rule(function) for function in _WITH_INDICES},
    **{function: _along_rule(function, tensors) for function, tensors in _ALONG.items()},
    **{getattr(Tensor, one.__name__): _along_rule(one, tensors) for one, tensors in _ALONG.items()},
    **{function: _number_rule(function) for function in _ARITHMETIC},
    torch.cat: _cat_rule,
    F.linear: _linear_rule,
    F.scaled_dot_product_attention: _attention_rule,
    torch.conv1d: _conv_rule(torch.conv1d, 1),
    torch.conv2d: _conv_rule(torch.conv2d, 2),
    torch.conv3d: _conv_rule(torch.conv3d, 3),
    F.batch_norm: _batch_norm_rule,
    F.layer_norm: _layer_norm_rule,
    F.group_norm: _group_norm_rule,
    F.instance_norm: _instance_norm_rule,
    torch.bmm: _matmul_rule(torch.bmm),
    torch.matmul: _matmul_rule(torch.matmul),
    Tensor.__matmul__: _matmul_rule(Tensor.__matmul__),
    Tensor.bmm: _matmul_rule(Tensor.bmm),
    Tensor.matmul: _matmul_rule(Tensor.matmul),
    torch.gru: recurrent_rule(torch.gru, 1, _layer),
    torch.lstm: recurrent_rule(torch.lstm, 2, _layer),
    torch.rnn_relu: recurrent_rule(torch.rnn_relu, 1, _layer),
    torch.rnn_tanh: recurrent_rule(torch.rnn_tanh, 1, _layer),
}
