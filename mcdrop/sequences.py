"""Attention and recurrent networks, whose fused kernels hide their dropout: the same algebra with masks in reach."""

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdrop.attention import in_groups
from mcdrop.errors import ModelRefused
from mcdrop.intercept import PACKED, Folded, Interception, Rules
from mcdrop.recurrent import for_cudnn, run_layer

__all__ = ["SEQUENCE_RULES", "body_rule", "over_passes", "recurrent_rule"]

Function = Callable[..., Any]


def inside(function: Function) -> Function:
    """Gives the same Python function without its own hand-over to overrides, so that its body runs under the mode."""
    body = types.FunctionType(
        function.__code__,
        {**function.__globals__, **dict.fromkeys(_HAND_OVER, lambda *tensors: False)},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_HAND_OVER = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def body_rule(function: Function) -> Function:
    """A rule that runs a function's own body under the mode, so that the draws inside it are seen."""
    body = inside(function)

    def rule(mode: Interception, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return body(*args, **kwargs)

    return rule


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(
    mode: Interception, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(QK' / sqrt(d)) with a mask on the weights, then V; the fused kernels take no mask."""
    if not dropout_p:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = in_groups(query, key, value)
    with mode:  # which may keep the product whole
        products = query @ key.transpose(-2, -1)
    weights = products * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        weights = weights.masked_fill(~seen, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        weights = weights + attn_mask
    dropped = mode.drop(weights.softmax(-1), dropout_p)
    with mode:
        output: Tensor = dropped @ value
    if attn_mask is None:
        return output
    hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
    return output.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # as torch does for padding, where a softmax is NaN


# -- recurrent ---------------------------------------------------------------------------------------------------------


class _Layer(torch.autograd.Function):
    """One recurrent layer with a rule for vmap: torch has none, so the sample axis is folded into the rows'."""

    @staticmethod
    def forward(
        function: Function, bias: bool, both_ways: bool, rows_first: bool, states: int, *tensors: Tensor
    ) -> Any:
        """Runs the layer without dropout: tensors are the input, the initial states, then the weights."""
        initial, weights = tensors[1 : 1 + states], tensors[1 + states :]
        return run_layer(function, tensors[0], initial, weights, bias, both_ways, rows_first)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing: no gradient is asked for."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, function: Function, bias: bool, both_ways: bool, rows_first: bool, states: int,
        *tensors: Tensor,
    ) -> Any:  # fmt: skip
        """Folds the passes into the rows, or loops over them where the weights differ from pass to pass."""
        head = (function, bias, both_ways, rows_first, states)
        dims, count = in_dims[5:], info.batch_size

        def run(*each: Tensor) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = _Layer.apply(*head, *each)  # type: ignore[no-untyped-call]
            return outputs

        if any(dim is not None for dim in dims[1 + states :]):
            return _stacked([run(*_select(tensors, dims, i)) for i in range(count)])
        outputs = over_passes(run, tensors, dims, count, states=states, rows_first=rows_first)
        return outputs, (0,) * len(outputs)


def over_passes(
    run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], dims: Sequence[int | None], count: int, *,
    states: int, rows_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Runs a recurrent layer over all passes at once, folded into the rows; its weights are the same in all."""
    row_axis = 0 if rows_first else 1
    x = _sampled(tensors[0], dims[0], count).movedim(0, row_axis).flatten(row_axis, row_axis + 1)
    initial = [
        _sampled(state, dim, count).movedim(0, 1).flatten(1, 2)
        for state, dim in zip(tensors[1 : 1 + states], dims[1:], strict=False)
    ]
    output, *final = run(x, *initial, *tensors[1 + states :])
    opened = output.unflatten(row_axis, (count, -1)).movedim(row_axis, 0)
    return (opened, *(state.unflatten(1, (count, -1)).movedim(1, 0) for state in final))


class _PackedLayer(torch.autograd.Function):
    """The same for packed sequences: (steps and rows, features) with the number of rows at each step."""

    @staticmethod
    def forward(function: Function, bias: bool, both_ways: bool, states: int, sizes: Tensor, *tensors: Tensor) -> Any:
        """Runs the layer without dropout."""
        x, initial, weights = for_cudnn(tensors[0], tensors[1 : 1 + states], tensors[1 + states :])
        start = tuple(initial) if states == 2 else initial[0]
        return tuple(function(x, sizes, start, weights, bias, 1, 0.0, False, both_ways))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing: no gradient is asked for."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, function: Function, bias: bool, both_ways: bool, states: int, sizes: Tensor,
        *tensors: Tensor,
    ) -> Any:  # fmt: skip
        """Interleaves the passes row by row, so that the longest sequences stay first at every step."""
        dims, count = in_dims[5:], info.batch_size
        head = (function, bias, both_ways, states)
        if any(dim is not None for dim in dims[1 + states :]):
            outputs = [_PackedLayer.apply(*head, sizes, *_select(tensors, dims, i)) for i in range(count)]  # type: ignore[no-untyped-call]
            return _stacked(outputs)
        steps = sizes.tolist()
        sampled = _sampled(tensors[0], dims[0], count)
        x = torch.cat([step.transpose(0, 1).flatten(0, 1) for step in sampled.split(steps, 1)])
        initial = [
            _sampled(state, dim, count).permute(1, 2, 0, 3).flatten(1, 2)
            for state, dim in zip(tensors[1 : 1 + states], dims[1:], strict=False)
        ]
        output, *final = _PackedLayer.apply(*head, sizes * count, x, *initial, *tensors[1 + states :])  # type: ignore[no-untyped-call]
        by_step = zip(output.split([size * count for size in steps]), steps, strict=True)
        opened = torch.cat([step.unflatten(0, (size, count)).transpose(0, 1) for step, size in by_step], 1)
        ends = [state.unflatten(1, (-1, count)).permute(2, 0, 1, 3) for state in final]
        return (opened, *ends), (0,) * (1 + len(ends))


def _sampled(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """Puts the sample axis first, or adds it."""
    return tensor.unsqueeze(0).expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _select(tensors: tuple[Tensor, ...], dims: tuple[int | None, ...], index: int) -> list[Tensor]:
    return [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, dims, strict=True)]


def _stacked(outputs: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def recurrent_rule(function: Function, states: int, layer: Function | None = None) -> Function:
    """A rule for ``torch.lstm`` and its like: layer by layer, with our mask between the layers.

    ``layer`` is what runs one layer, with the arguments of ``_Layer.forward``; packed sequences have their own.
    """
    apply: Any = _Layer.apply if layer is None else layer

    def rule(mode: Interception, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        packed = not isinstance(rest[2], bool)
        if packed:
            sizes, initial, weights, bias, layers, p, train, both_ways = rest
        else:
            initial, weights, bias, layers, p, train, both_ways, rows_first = rest
        ways = 2 if both_ways else 1
        per_layer = len(weights) // layers
        ends: list[list[Tensor]] = []
        for level in range(layers):
            own = weights[level * per_layer : (level + 1) * per_layer]
            start = [state[level * ways : (level + 1) * ways] for state in (initial if states == 2 else (initial,))]
            if packed:
                x, *end = _PackedLayer.apply(function, bias, both_ways, states, sizes, x, *start, *own)  # type: ignore[no-untyped-call]
            else:
                x, *end = apply(function, bias, both_ways, rows_first, states, x, *start, *own)
            ends.append(end)
            if level < layers - 1 and p > 0 and (train or mode.source.forces(p)):
                x = _drop_packed(mode, x, sizes, p) if packed else mode.drop(x, p)
        with mode:  # a capture has its own way to join them
            return (x, *(torch.cat(each) for each in zip(*ends, strict=True)))

    return rule


def _drop_packed(mode: Interception, x: Tensor, sizes: Tensor, p: float) -> Tensor:
    """Draws as for padded sequences (steps, rows, features) and takes what is there of each step."""
    if isinstance(mode.source, Folded):
        raise ModelRefused(PACKED)
    steps = sizes.tolist()
    rows, features = steps[0], x.shape[-1]
    factor = mode.drop(torch.ones(len(steps), rows, features, dtype=x.dtype, device=x.device), p)
    return x * torch.cat([factor[step, :size] for step, size in enumerate(steps)])


def _gates(mode: Interception, x: Tensor, hidden: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    w_in, w_hidden, b_in, b_hidden = weights
    with mode:  # a capture has its own linear layers
        return F.linear(x, w_in, b_in), F.linear(hidden, w_hidden, b_hidden)  # type: ignore[arg-type]


def _lstm_cell(
    mode: Interception, x: Tensor, state: tuple[Tensor, Tensor], w_in: Tensor, w_hidden: Tensor,
    b_in: Tensor | None = None, b_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, cell = state
    of_x, of_hidden = _gates(mode, x, hidden, w_in, w_hidden, b_in, b_hidden)
    enter, forget, new, leave = (of_x + of_hidden).chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru_cell(
    mode: Interception, x: Tensor, hidden: Tensor, w_in: Tensor, w_hidden: Tensor,
    b_in: Tensor | None = None, b_hidden: Tensor | None = None,
) -> Tensor:  # fmt: skip
    of_x, of_hidden = _gates(mode, x, hidden, w_in, w_hidden, b_in, b_hidden)
    reset_x, keep_x, new_x = of_x.chunk(3, -1)
    reset_h, keep_h, new_h = of_hidden.chunk(3, -1)
    keep = (keep_x + keep_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (1 - keep) * new + keep * hidden


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Function:
    def rule(
        mode: Interception, x: Tensor, hidden: Tensor, w_in: Tensor, w_hidden: Tensor,
        b_in: Tensor | None = None, b_hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return activation(torch.add(*_gates(mode, x, hidden, w_in, w_hidden, b_in, b_hidden)))

    return rule


SEQUENCE_RULES: Rules = {
    F.multi_head_attention_forward: body_rule(F.multi_head_attention_forward),
    F.scaled_dot_product_attention: _attention,
    torch.gru: recurrent_rule(torch.gru, 1),
    torch.gru_cell: _gru_cell,
    torch.lstm: recurrent_rule(torch.lstm, 2),
    torch.lstm_cell: _lstm_cell,
    torch.rnn_relu: recurrent_rule(torch.rnn_relu, 1),
    torch.rnn_relu_cell: _rnn_cell(torch.relu),
    torch.rnn_tanh: recurrent_rule(torch.rnn_tanh, 1),
    torch.rnn_tanh_cell: _rnn_cell(torch.tanh),
}
