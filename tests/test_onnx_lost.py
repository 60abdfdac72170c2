"""What an exporter lost is named: attention, and recurrent layers that feed each other, without dropout."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from graphs import X, by_hand, number, parsed
from onnx import TensorProto, helper

import mcdrop
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


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(*between: str, scores: str = "x", product: str = "MatMul", first: bool = True, values: str = "x") -> Any:
    """Scores of x and of another value, their softmax, some nodes, and a product with values."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["query"]),
        helper.make_node("MatMul", ["query", scores], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["v0"], name="soft"),
        helper.make_node("RandomUniformLike", ["x"], ["u"]),
        helper.make_node("Less", ["u", "level"], ["hit"]),
        helper.make_node("Cast", ["hit"], ["coin"], to=TensorProto.FLOAT),
    ]
    for i, kind in enumerate(between):
        operator, *others = kind.split()
        nodes.append(helper.make_node(operator, [*others, f"v{i}"], [f"v{i + 1}"]))
    last = f"v{len(between)}"
    nodes.append(helper.make_node(product, [last, values] if first else [values, last], ["y"]))
    return parsed(by_hand(nodes, initial=tuple(number(name, 1.0) for name in ("w", "bias", "level", "zero"))))


@pytest.mark.parametrize("between", [
    (), ("Cast", "Identity"), ("Reshape", "Transpose"), ("Mul w",), ("QuantizeLinear", "DequantizeLinear"),
    ("DynamicQuantizeLinear",), ("Where zero w",),
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize(("product", "first"), [
    ("MatMul", True), ("MatMul", False), ("FusedMatMul", True), ("Einsum", True), ("MatMulInteger", False),
])  # fmt: skip
def test_attention_without_dropout_is_named_on_whatever_way_it_is_computed(
    between: tuple[str, ...], product: str, first: bool
) -> None:
    model = _attention(*between, product=product, first=first)
    (said,) = lost(model, [], ())
    assert "attention without dropout at soft:" in said
    assert lost(model, [], {"soft"}) == []


@pytest.mark.parametrize("model", [
    _attention("Dropout"),
    _attention("Cast", "Dropout", "Reshape"),
    _attention("Mul coin"),
    _attention("Div w", "Where hit zero", "Cast"),
    _attention("Mul bias", scores="w"),  # probabilities of classes, with their priors
    _attention("Transpose", scores="w", product="Einsum"),
    _attention(values="w"),
])  # fmt: skip
def test_attention_with_dropout_and_probabilities_of_classes_are_not(model: Any) -> None:
    assert lost(model, [], ()) == []


def test_attention_without_dropout_is_named_in_a_body_too() -> None:
    inner = _attention().graph
    del inner.input[:]
    again = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "other", [], [inner.output[0]])
    again.output[0].name = "z"
    node = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=again)
    (said,) = lost(parsed(by_hand([node], initial=(number("yes", True, TensorProto.BOOL),))), [], ())
    assert "attention without dropout at soft:" in said


@pytest.mark.parametrize(("kind", "domain"), [
    ("Attention", ""), ("Attention", "com.microsoft"), ("MultiHeadAttention", "com.microsoft"),
])  # fmt: skip
def test_attention_in_one_operator_is_named_whatever_is_injected(kind: str, domain: str) -> None:
    node = helper.make_node(kind, ["x", "x", "x"], ["y"], name="whole", domain=domain)
    (said,) = lost(parsed(by_hand([node], opset=23)), [], {"whole"})
    assert "at whole" in said
    assert "mcdrop.save" in said


def test_what_the_optimiser_of_the_runtime_wrote_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["h"]),
        helper.make_node("Dropout", ["h", "p", "yes"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    data = by_hand(nodes, initial=(number("p", 0.5), number("yes", True, TensorProto.BOOL)))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4  # it warns that the file may fit this machine only
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    written = onnx.load(options.optimized_model_filepath)
    before, after = mcdrop.wrap(parsed(data), example=X).audit, mcdrop.wrap(written, example=X).audit
    assert (len(before.live), len(after.live)) == (2, 1)  # which is what the warning is for
    assert before.warnings == ()
    assert ["optimiser" in said for said in after.warnings] == [True]
