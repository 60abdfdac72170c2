"""What an exporter lost is named: recurrent layers that feed each other without dropout."""

from typing import Any

import pytest
from graphs import by_hand, parsed
from onnx import helper

from mcdrop.onnx_lost import lost
from mcdrop.onnx_slots import SITES


def _stack(*between: str) -> Any:
    """Two recurrent layers with some nodes between them, and one that hangs on the state of the last."""
    names = ["a", *(f"v{i}" for i in range(len(between)))]
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["a"], name="first")]
    nodes += [helper.make_node(kind, [names[i], "s"], [names[i + 1]]) for i, kind in enumerate(between)]
    nodes += [helper.make_node("GRU", [names[-1], "w", "r"], ["", "state"], name="second")]
    nodes += [helper.make_node("RNN", ["state", "w", "r"], ["y"], name="third")]
    return parsed(by_hand(nodes))


@pytest.mark.parametrize(
    ("between", "bare"),
    [
        ((), True),
        (("Transpose", "Reshape"), True),
        (("Squeeze",), True),
        (("Dropout",), False),
        (("Transpose", "Dropout", "Reshape"), False),
        (("Relu",), False),
    ],
)
def test_layers_that_feed_the_next_without_dropout_are_named(between: tuple[str, ...], bare: bool) -> None:
    said = lost(_stack(*between), [], ())
    assert ["at first:" in one for one in said] == [True] * bare
    assert lost(_stack(*between), [], {"first"}) == []


def test_a_graph_that_mcdrop_wrote_has_lost_nothing() -> None:
    model = _stack()
    model.metadata_props.add(key=SITES, value="[]")
    assert lost(model, [], ()) == []
