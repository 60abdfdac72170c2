"""One recurrent layer without dropout, as torch's own functions run it: sizes checked, memory as a GPU wants it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["for_cudnn", "run_layer"]


def run_layer(
    function: Callable[..., Any], x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], bias: bool,
    both_ways: bool, rows_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gives the output and the last states of a layer, of ``torch.lstm`` or its like.

    Raises:
        RuntimeError: states or weights of a size that does not fit.
    """
    if len(initial) == 2:
        _check_lstm(x, initial, weights, both_ways, rows_first)
    x, initial, weights = for_cudnn(x, initial, weights)
    start = tuple(initial) if len(initial) == 2 else initial[0]
    return tuple(function(x, start, weights, bias, 1, 0.0, False, both_ways, rows_first))


def _check_lstm(
    x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], both_ways: bool, rows_first: bool
) -> None:
    """Checks what torch does not: its LSTM for CPUs writes past the end of memory where sizes differ."""
    ways, rows = 2 if both_ways else 1, x.shape[0 if rows_first else 1]
    per_way, (gates, units) = len(weights) // ways, weights[1].shape
    states, both = [(ways, rows, units), (ways, rows, gates // 4)], [(gates, x.shape[-1]), (gates, units)]
    fitting = [*states, *both[:1] * ways, *both[1:] * ways]
    given = [tuple(one.shape) for one in (*initial, *weights[::per_way], *weights[1::per_way])]
    if given != fitting:
        what = f"an input of the shape {tuple(x.shape)}"
        raise RuntimeError(f"for {what}, states and weights of an LSTM have the shapes {fitting}, got {given}")


def for_cudnn(
    x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gives a recurrent layer's tensors as a GPU wants them: in order, and the weights in one piece of memory."""
    if not x.is_cuda or type(x) is not Tensor:
        return x, [*initial], [*weights]
    return x.contiguous(), [state.contiguous() for state in initial], _in_one_piece(weights)


def _in_one_piece(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights one after another in memory, matrices first: else torch warns, and copies them all the same."""
    ordered = sorted(weights, key=lambda weight: -weight.dim())
    ends = [one.data_ptr() + one.nbytes for one in ordered]
    if all(end == one.data_ptr() for end, one in zip(ends, ordered[1:], strict=False)):
        return [*weights]
    parts = torch.cat([one.reshape(-1) for one in ordered]).split([one.numel() for one in ordered])
    placed = {id(one): part.view(one.shape) for one, part in zip(ordered, parts, strict=True)}
    return [placed[id(one)] for one in weights]
