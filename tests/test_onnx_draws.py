"""Draws of a graph become masks whatever they are named, typed or mixed with, and are not injected after."""

from typing import Any

import numpy as np
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from onnx import TensorProto, helper, version_converter

import mcdrop
from mcdrop.errors import InputError, UncontrolledDraw
from mcdrop.wrapping import wrap_graph

FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16
P = number("p", 0.25)


def _node(operator: str, inputs: str, outputs: str, **given: Any) -> Any:
    return helper.make_node(operator, inputs.split(), outputs.split(), **given)


def _with_microsoft(data: bytes) -> Any:
    model = parsed(data)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


# -- inject ------------------------------------------------------------------------------------------------------------

COIN = [
    _node("RandomUniformLike", "x", "u", name="numbers"),
    _node("Less", "u p", "hit", name="comparison"),
    _node("Cast", "hit", "kept", to=FLOAT),
    _node("Mul", "x kept", "y"),
]


@pytest.mark.parametrize(("nodes", "name"), [
    ([_node("Dropout", "x p", "y", name="drop")], "drop"),
    ([_node("RandomNormalLike", "x", "n", name="noise"), _node("Add", "x n", "y")], "noise"),
    ([_node("Bernoulli", "x", "b", name="bits"), _node("Mul", "x b", "y")], "bits"),
    (COIN, "numbers"),
    (COIN, "comparison"),
])  # fmt: skip
def test_nothing_is_injected_after_what_draws_itself(nodes: list[Any], name: str) -> None:
    with pytest.raises(InputError, match=f"after '{name}', which draws itself"):
        wrap_graph(by_hand(nodes, initial=(P,)), example=X, inject={name: 0.25})


@pytest.mark.parametrize(("kind", "said"), [(TensorProto.INT64, "INT64"), (TensorProto.BOOL, "BOOL")])
def test_nothing_is_injected_after_whole_numbers(kind: int, said: str) -> None:
    """A mask of 1 / (1 - p) in their type is 1: what was kept would not be scaled, and the mean too small."""
    nodes = [_node("Cast", "x", "ids", name="ids", to=kind), _node("Cast", "ids", "y", name="back", to=FLOAT)]
    with pytest.raises(InputError, match=rf"after 'ids', whose numbers are {said}.*a Cast to FLOAT after it"):
        wrap_graph(by_hand(nodes), example=X, inject={"ids": 0.25})
    passes = passes_of(wrap_graph(by_hand(nodes), example=X, inject={"back": 0.25}), X)
    whole = X.astype(helper.tensor_dtype_to_np_dtype(kind))
    assert np.abs(passes - dropped(whole)).max() <= 1e-6


def test_a_dropout_after_a_node_without_a_name_is_named_by_what_that_makes() -> None:
    model = wrap_graph(by_hand([_node("Relu", "x", "y")]), example=X, inject={"Relu:y": 0.25})
    assert [site.path for site in model.audit.live] == ["Relu:y"]


def test_an_injected_dropout_takes_no_name_that_is_there() -> None:
    nodes = [
        _node("Relu", "x", "h", name="here"),
        _node("Identity", "h", "h.undropped"),
        _node("Add", "h h.undropped", "y"),
    ]
    passes = passes_of(wrap_graph(by_hand(nodes), example=X, inject={"here": 0.25}), X)
    assert np.abs(passes - 2 * dropped(np.maximum(X, 0))).max() <= 1e-6


def test_a_draw_of_a_given_shape_takes_no_name_that_is_there() -> None:
    nodes = [
        _node("Identity", "x", "u.like"),
        _node("RandomUniform", "", "u", shape=[1, 6]),
        _node("Mul", "u.like u", "y"),
    ]
    u = mcdrop.sample_masks([mcdrop.Site("site0", (1, 6), 0.0, "uniform")], 20, seed=5, start=3, sampler="balanced")
    assert np.abs(passes_of(mcdrop.wrap(parsed(by_hand(nodes)), example=X), X) - X * u["site0"]).max() <= 1e-6


# -- rates, masks and types --------------------------------------------------------------------------------------------


def test_a_rate_of_a_type_that_numpy_lacks_is_that_number() -> None:
    nodes = [_node("Dropout", "x p", "y")]
    model = mcdrop.wrap(parsed(by_hand(nodes, opset=22, initial=(number("p", 0.25, BFLOAT16),))), example=X)
    assert np.abs(passes_of(model, X) - dropped(X)).max() <= 1e-6


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, FLOAT, TensorProto.DOUBLE])
def test_a_rate_is_the_number_that_was_meant_in_its_own_type(kind: int, p: float) -> None:
    """So that a graph in float16 has the masks of its network: 0.3 is 0.30004883 there."""
    rate = number("p", p, kind)
    coin = [_node("CastLike", "x p", "like"), _node("RandomUniformLike", "like", "u"), _node("Less", "u p", "hit")]
    coin += [_node("Cast", "hit", "kept", to=FLOAT), _node("Mul", "x kept", "y")]
    for nodes, expected in (([_node("Dropout", "x p", "y")], p), (coin, round(1 - p, 1))):
        model = mcdrop.wrap(parsed(by_hand(nodes, initial=(rate,))), example=X)
        assert [(site.kind, site.p) for site in model.audit.live] == [("bernoulli", expected)]


COMPUTED = {
    "what is kept": [_node("Sub", "one keep", "q")],
    "in another shape": [_node("Unsqueeze", "p first", "wide"), _node("Squeeze", "wide", "q")],
    "in two steps": [_node("Mul", "keep keep", "square"), _node("Neg", "square", "less"), _node("Add", "less r", "q")],
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_a_rate_that_constants_make_is_that_number(case: str) -> None:
    first = number("first", [0], TensorProto.INT64)
    given = (P, first, number("one", 1.0), number("keep", [0.75]), number("r", 0.8125))
    model = mcdrop.wrap(parsed(by_hand([*COMPUTED[case], _node("Dropout", "x q", "y")], initial=given)), example=X)
    assert [site.p for site in model.audit.live] == [0.25]
    assert np.abs(passes_of(model, X) - dropped(X)).max() <= 1e-6


def test_a_coin_that_is_cast_to_the_type_of_other_values_is_one() -> None:
    """As torch exports channel dropout where it optimises nothing; without a draw its units are kept whole."""
    nodes = [_node("CastLike", "keep x", "level"), _node("RandomUniformLike", "x", "u")]
    nodes += [_node("CastLike", "level u", "same"), _node("Less", "u same", "hit"), _node("CastLike", "hit x", "kept")]
    nodes += [_node("Mul", "x kept", "scaled"), _node("Div", "scaled keep", "y")]
    model = mcdrop.wrap(parsed(by_hand(nodes, initial=(number("keep", 0.75),))), example=X)
    assert [(site.kind, site.p) for site in model.audit.live] == [("bernoulli", 0.25)]
    assert np.abs(passes_of(model, X) - dropped(X)).max() <= 1e-6
    off = mcdrop.predict(model, X, passes=20).deterministic
    assert off is not None
    np.testing.assert_allclose(off, X, rtol=1e-6)


def test_a_graph_that_has_no_eval_output_is_not_said_to_keep_its_mean() -> None:
    nodes = [_node("RandomUniformLike", "x", "u"), _node("Add", "u p", "v"), _node("Floor", "v", "hit")]
    audit = mcdrop.wrap(parsed(by_hand([*nodes, _node("Mul", "x hit", "y")], initial=(P,))), example=X).audit
    assert audit.mean_preserving is None
    assert "mean preserving" not in str(audit)


def test_a_number_below_a_computed_level_stays_a_uniform_draw() -> None:
    """As artifacts hold it: as coins the same seeds would keep other units."""
    nodes = [_node("Sub", "one p", "keep"), _node("RandomUniformLike", "x", "u"), _node("Less", "u keep", "hit")]
    nodes += [_node("Cast", "hit", "kept", to=FLOAT), _node("Mul", "x kept", "y")]
    model = mcdrop.wrap(parsed(by_hand(nodes, initial=(P, number("one", 1.0)))), example=X)
    assert [site.kind for site in model.audit.live] == ["uniform"]
    u = mcdrop.sample_masks([mcdrop.Site("site0", (6,), 0.0, "uniform")], 20, seed=5, start=3, sampler="balanced")
    np.testing.assert_array_equal(passes_of(model, X), X * (u["site0"] < np.float32(0.75))[:, None])


def test_a_rate_of_no_number_is_refused_as_ever() -> None:
    nodes = [_node("Div", "zero zero", "q"), _node("Dropout", "x q", "y")]
    with pytest.raises(UncontrolledDraw, match="between 0 and 1, got nan"):
        mcdrop.wrap(parsed(by_hand(nodes, initial=(number("zero", 0.0),))), example=X)


def test_operators_too_old_for_masks_are_named() -> None:
    """The runtime itself knows those of opset 7 and later."""
    source = parsed(by_hand([_node("Dropout", "x", "y", ratio=0.25)], opset=6))
    with pytest.raises(UncontrolledDraw, match=r"opset 6.*up to opset 7 or later with onnx\.version_converter"):
        mcdrop.wrap(source, example=X)
    newer = version_converter.convert_version(source, 17)
    assert np.abs(passes_of(mcdrop.wrap(newer, example=X), X) - dropped(X)).max() <= 1e-6


def test_a_mask_that_nobody_reads_needs_no_newer_operators() -> None:
    data = by_hand([_node("Dropout", "x", "y mask", ratio=0.25)], opset=7)
    assert np.abs(passes_of(mcdrop.wrap(parsed(data), example=X), X) - dropped(X)).max() <= 1e-6


@pytest.mark.parametrize("opset", [11, 13, 15])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, FLOAT, TensorProto.DOUBLE])
def test_what_an_operator_of_the_runtime_alone_makes_is_dropped_in_its_own_type(kind: int, opset: int) -> None:
    drop = _node("Dropout", "h", "y", ratio=0.25) if opset < 12 else _node("Dropout", "h p", "y")
    nodes = [_node("FusedMatMul", "x eye", "h", domain="com.microsoft"), drop]
    eye = number("eye", np.eye(6), kind)
    x = X.astype(helper.tensor_dtype_to_np_dtype(kind))
    given = _with_microsoft(by_hand(nodes, opset=opset, dtype=kind, initial=(eye, P)[: 1 + (opset >= 12)]))
    model = mcdrop.wrap(given, example=x)
    assert model.audit.tier == "fold"
    rounding = max(np.finfo(x.dtype).eps, np.finfo(np.float32).eps)  # masks are in float32
    assert np.abs(passes_of(model, x) - dropped(x)).max() <= 4 * rounding * np.abs(x).max()


@pytest.mark.parametrize("operator", ["BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", "Sampling"])
def test_draws_of_the_runtime_alone_are_refused_beside_others(operator: str) -> None:
    nodes = [_node("Dropout", "x p", "h"), _node(operator, "h", "y", domain="com.microsoft")]
    with pytest.raises(UncontrolledDraw, match=operator):
        mcdrop.wrap(_with_microsoft(by_hand(nodes, initial=(P,))), example=X)
