"""Which calls a capture keeps whole: each becomes one node of the graph, one of ``kernels``.

What no rule covers, here or in ``row_rules`` (a convolution of a single image, say), runs as it is: vmap cuts it up.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdrop.attention import ATTENTION, in_groups
from mcdrop.intercept import Interception, Rules
from mcdrop.kernels import BATCH_NORM, CAT, CONV, LAYER_NORM, LINEAR, MATMUL, RECURRENT
from mcdrop.row_rules import ROW_RULES, by_row_rule
from mcdrop.rules import RULES, by_torchs_own
from mcdrop.sequences import recurrent_rule

__all__ = ["KERNEL_RULES"]


def _linear_rule(mode: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = LINEAR(input, weight, bias)
    return output


def _each(value: Any, inner: int) -> list[int]:
    return [value] * inner if isinstance(value, int) else [*value] * (inner if len(value) == 1 else 1)


def _conv_rule(function: Callable[..., Tensor], inner: int) -> Callable[..., Tensor]:
    whole = by_row_rule(function)

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


def _added_matmul_rule(
    mode: Interception, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product: Tensor = MATMUL(batch1, batch2)
    product = product if alpha == 1 else product * alpha
    return product + (input if beta == 1 else input * beta) if beta else product


def _cosine_rule(mode: Interception, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    if dim >= 0 and x1.dim() != x2.dim():
        return F.cosine_similarity(x1, x2, dim, eps)
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _truth_rule(mode: Interception, input: Tensor) -> bool:
    """Torch looks whether a mask is causal, for a hint; where there is none, it uses the mask."""
    frame = sys._getframe(1)
    for _ in range(3):
        if frame.f_code is _LOOKS_FOR_CAUSAL:
            return False
        frame = frame.f_back or frame
    return bool(input)


def _never(mode: Interception, *args: Any) -> bool:
    """Whether padding stands at the end alone: asked before a way that torch does not take under a mode."""
    return False


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


_LOOKS_FOR_CAUSAL = nn.modules.transformer._detect_is_causal_mask.__code__
_ARITHMETIC = (
    Tensor.__mul__, Tensor.__rdiv__, Tensor.__rmul__, Tensor.__truediv__, Tensor.div, Tensor.mul, torch.div, torch.mul
)  # fmt: skip
_ACTIVATIONS = (
    F.celu, F.elu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu6, F.selu, F.silu, F.threshold
)  # fmt: skip

KERNEL_RULES: Rules = by_torchs_own({
    **RULES,
    **ROW_RULES,
    **{function: _activation_rule(function) for function in _ACTIVATIONS},
    **{function: _number_rule(function) for function in _ARITHMETIC},
    torch.cat: _cat_rule,
    F.cosine_similarity: _cosine_rule,
    F.linear: _linear_rule,
    F.scaled_dot_product_attention: _attention_rule,
    torch.conv1d: _conv_rule(torch.conv1d, 1),
    torch.conv2d: _conv_rule(torch.conv2d, 2),
    torch.conv3d: _conv_rule(torch.conv3d, 3),
    F.batch_norm: _batch_norm_rule,
    F.layer_norm: _layer_norm_rule,
    F.group_norm: _group_norm_rule,
    Tensor.__bool__: _truth_rule,
    torch._nested_tensor_from_mask_left_aligned: _never,
    torch.baddbmm: _added_matmul_rule,
    torch.bmm: _matmul_rule(torch.bmm),
    torch.matmul: _matmul_rule(torch.matmul),
    Tensor.__matmul__: _matmul_rule(Tensor.__matmul__),
    Tensor.baddbmm: _added_matmul_rule,
    Tensor.bmm: _matmul_rule(Tensor.bmm),
    Tensor.matmul: _matmul_rule(Tensor.matmul),
    torch.gru: recurrent_rule(torch.gru, 1, _layer),
    torch.lstm: recurrent_rule(torch.lstm, 2, _layer),
    torch.rnn_relu: recurrent_rule(torch.rnn_relu, 1, _layer),
    torch.rnn_tanh: recurrent_rule(torch.rnn_tanh, 1, _layer),
})  # fmt: skip
