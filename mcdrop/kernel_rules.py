"""Which calls a capture keeps whole: each becomes one node of the graph, one of ``kernels``.

What a rule does not cover (a padding that is named, a pool that rounds up) runs as it is and is taken apart by vmap.
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
from mcdrop.kernels import BATCH_NORM, CAT, CONV, LAYER_NORM, LINEAR, MATMUL, POOL, RECURRENT
from mcdrop.rules import RULES
from mcdrop.sequences import recurrent_rule

__all__ = ["KERNEL_RULES"]


def _linear_rule(mode: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = LINEAR(input, weight, bias)
    return output


def _each(value: Any, inner: int) -> list[int]:
    return [value] * inner if isinstance(value, int) else [*value] * (inner if len(value) == 1 else 1)


def _conv_rule(function: Callable[..., Tensor], inner: int) -> Callable[..., Tensor]:
    def rule(
        mode: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        if isinstance(padding, str) or input.dim() != inner + 2:
            return function(input, weight, bias, stride, padding, dilation, groups)
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


def _max_pool_rule(
    mode: Interception, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    if ceil_mode or return_indices or dilation not in (1, (1, 1), [1, 1]) or input.dim() != 4:
        function: Any = F.max_pool2d
        return function(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    output: Tensor = POOL(input, "max", 2, _each(kernel_size, 2), _each(stride or kernel_size, 2), _each(padding, 2))
    return output


def _average_pool_rule(
    mode: Interception, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    if ceil_mode or not count_include_pad or divisor_override is not None or input.dim() != 4:
        return F.avg_pool2d(
            input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad, divisor_override
        )
    output: Tensor = POOL(
        input, "average", 2, _each(kernel_size, 2), _each(stride or kernel_size, 2), _each(padding, 2)
    )
    return output


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


_ACTIVATIONS = (
    F.celu, F.elu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu6, F.selu, F.silu, F.threshold
)  # fmt: skip

KERNEL_RULES: Rules = {
    **RULES,
    **{function: _activation_rule(function) for function in _ACTIVATIONS},
    torch.cat: _cat_rule,
    F.linear: _linear_rule,
    F.scaled_dot_product_attention: _attention_rule,
    torch.conv1d: _conv_rule(torch.conv1d, 1),
    torch.conv2d: _conv_rule(torch.conv2d, 2),
    torch.conv3d: _conv_rule(torch.conv3d, 3),
    F.batch_norm: _batch_norm_rule,
    F.layer_norm: _layer_norm_rule,
    F.group_norm: _group_norm_rule,
    F.max_pool2d: _max_pool_rule,
    F.avg_pool2d: _average_pool_rule,
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
