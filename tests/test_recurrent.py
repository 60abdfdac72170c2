"""Recurrent layers run by torch's own functions, whose sizes it does not check."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcdrop.recurrent import run_layer

ROWS, STEPS, WIDTH, UNITS = 6, 5, 3, 4


def _given(kind: Any, **how: Any) -> tuple[nn.RNNBase, Tensor, list[Tensor]]:
    """A layer, rows for it and first states."""
    torch.manual_seed(0)
    layer = kind(WIDTH, UNITS, **how)
    ways, last = 2 if layer.bidirectional else 1, layer.proj_size or UNITS
    states = [torch.randn(ways, ROWS, last), torch.randn(ways, ROWS, UNITS)][: 2 if kind is nn.LSTM else 1]
    shape = (ROWS, STEPS, WIDTH) if layer.batch_first else (STEPS, ROWS, WIDTH)
    return layer, torch.randn(shape), states


@torch.no_grad()
def _run(layer: nn.RNNBase, x: Tensor, states: list[Tensor], weights: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    function = getattr(torch, layer.mode.lower())
    weights = [*layer.parameters()] if weights is None else weights
    return run_layer(function, x, states, weights, layer.bias, layer.bidirectional, layer.batch_first)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # which torch runs another way
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("how", [{}, {"bidirectional": True, "batch_first": True}, {"bias": False}, {"proj_size": 2}])
def test_a_layer_is_torchs_own(kind: Any, how: dict[str, Any]) -> None:
    if "proj_size" in how and kind is not nn.LSTM:
        pytest.skip("an LSTM alone has projections")
    layer, x, states = _given(kind, **how)
    with torch.no_grad():
        output, last = layer(x, tuple(states) if len(states) == 2 else states[0])
    for one, other in zip(_run(layer, x, states), (output, *(last if len(states) == 2 else (last,))), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize(
    ("place", "shape"),
    [
        ("x", (STEPS, ROWS + 2, WIDTH)), ("x", (STEPS, ROWS, WIDTH + 400)), ("hidden", (None, ROWS - 1, UNITS)),
        ("cell", (None, 1, UNITS)), ("cell", (None, ROWS, 1)), ("hidden", (3, ROWS, UNITS)), ("into", (16, 1)),
        ("between", (16, 90)), ("between", (12, UNITS)),
    ],
)  # fmt: skip
def test_an_lstm_of_sizes_that_do_not_fit_never_reaches_torch(
    place: str, shape: tuple[int | None, ...], both_ways: bool, dtype: torch.dtype
) -> None:
    """Torch writes past the end of memory there, and the process dies."""
    layer, x, (hidden, cell) = _given(nn.LSTM, bidirectional=both_ways)
    into, between, *rest = (one.detach() for one in layer.parameters())
    given = {"x": x, "hidden": hidden, "cell": cell, "into": into, "between": between}
    given[place] = torch.randn([layer.bidirectional + 1 if size is None else size for size in shape])
    x, hidden, cell, *weights = (one.to(dtype) for one in (*given.values(), *rest))
    with pytest.raises(RuntimeError, match="states and weights of an LSTM have the shapes"):
        _run(layer, x, [hidden, cell], weights)
