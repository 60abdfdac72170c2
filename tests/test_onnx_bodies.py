"""Draws in branches and loops: the masks of the draws that happen, or an error that says why not."""

from typing import Any

import numpy as np
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from numpy.typing import NDArray
from onnx import TensorProto, helper

import mcdrop
from mcdrop.errors import InputError, ModelRefused, UncontrolledDraw

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
ONES = np.ones((4, 6), np.float32)
P, YES, THREE = number("p", 0.25), number("yes", True, BOOL), number("three", 3, INT64)
FAR = 100 * ONES


def _info(name: str, kind: int = FLOAT, shape: Any = ("n", 6)) -> Any:
    return helper.make_tensor_value_info(name, kind, [*shape])


def _if(condition: str, output: str, then: list[Any], otherwise: list[Any]) -> Any:
    arms = {
        name: helper.make_graph(nodes, f"{name}.{output}", [], [_info(nodes[-1].output[0])])
        for name, nodes in (("then_branch", then), ("else_branch", otherwise))
    }
    return helper.make_node("If", [condition], [output], **arms)


def _loop(trips: str, start: str, output: str, nodes: list[Any], *, counter: Any = (), kind: int = FLOAT) -> Any:
    """A loop whose body makes ``next`` of ``h``; i counts its steps."""
    inputs = [_info("i", INT64, counter), _info("on", BOOL, ()), _info("h", kind)]
    nodes = [*nodes, helper.make_node("Identity", ["on"], ["go"])]
    body = helper.make_graph(nodes, f"body.{output}", inputs, [_info("go", BOOL, ()), _info("next", kind)])
    return helper.make_node("Loop", [trips, "", start], [output], body=body)


def _dropout(x: str, y: str) -> Any:
    return helper.make_node("Dropout", [x, "p", "yes"], [y])


def _wrapped(nodes: list[Any], *initial: Any, example: Any = X, **given: Any) -> Any:
    return mcdrop.wrap(parsed(by_hand(nodes, initial=(P, YES, *initial), **given)), example=example)


def _steps(x: NDArray[Any], steps: int) -> NDArray[Any]:
    """Dropout for some steps with masks of their own."""
    for step in range(steps):
        x = x * dropped(ONES, site=f"site{step}")
    return x


# -- branches ----------------------------------------------------------------------------------------------------------

SAME = [helper.make_node("Identity", ["x"], ["b"])]
STEP = [_dropout("h", "next")]
SCANNED = helper.make_node(
    "Scan", ["x", "steps"], ["a"], num_scan_inputs=1,
    body=helper.make_graph([_dropout("s", "t")], "scanned", [_info("s"), _info("one", shape=(6,))], [_info("t")]),
)  # fmt: skip
LOST: dict[str, tuple[list[Any], list[Any]]] = {
    "a comparison": (
        [
            helper.make_node("RandomUniformLike", ["x"], ["u"]),
            helper.make_node("Less", ["u", "p"], ["hit"]),
            helper.make_node("Where", ["hit", "x", "zero"], ["a"]),
        ],
        [],
    ),
    "a truth": (
        [
            helper.make_node("Dropout", ["x", "p", "yes"], ["_", "kept"]),
            helper.make_node("Where", ["kept", "x", "zero"], ["a"]),
        ],
        [],
    ),
    "a maximum": ([_dropout("x", "a")], [helper.make_node("Max", ["found", "zero"], ["safe"])]),
    "a loop": ([_loop("three", "x", "a", STEP)], [helper.make_node("Max", ["found", "zero"], ["safe"])]),
    "a scan": ([SCANNED], [helper.make_node("Max", ["found", "zero"], ["safe"])]),
}


@pytest.mark.parametrize("case", LOST)
def test_a_branch_with_draws_that_was_not_seen_never_answers_without_them(case: str) -> None:
    """What it was fed could be lost on its way to the output; the branch alone has to end the run."""
    then, after = LOST[case]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "far"], ["is_far"]),
        _if("is_far", "found", then, SAME),
        *after,
        _dropout(after[-1].output[0] if after else "found", "y"),
    ]
    steps = number("steps", np.zeros((2, 6)))
    model = _wrapped(nodes, THREE, number("far", 10.0), number("zero", 0.0), steps)
    last = model.audit.live[0].name
    assert np.abs(passes_of(model, np.abs(X)) - dropped(np.abs(X), site=last)).max() <= 1e-6
    with pytest.raises(ModelRefused, match="did not run on the example"):
        mcdrop.predict(model, FAR)


@pytest.mark.parametrize("opset", [7, 9, 11, 17])
def test_a_branch_draws_whatever_the_opset(opset: int) -> None:
    drop = _dropout("x", "a") if opset >= 12 else helper.make_node("Dropout", ["x"], ["a"], ratio=0.25)
    model = _wrapped([_if("yes", "y", [drop], SAME)], opset=opset)
    assert np.abs(passes_of(model, X) - dropped(X)).max() <= 1e-6


def test_a_branch_in_a_loop_that_draws_at_some_steps_is_refused_for_that() -> None:
    keep = [helper.make_node("Identity", ["h"], ["b"])]
    body = [helper.make_node("Less", ["i", "few"], ["early"]), _if("early", "next", [_dropout("h", "a")], keep)]
    with pytest.raises(ModelRefused, match="at some steps of its loop only"):
        _wrapped([_loop("three", "x", "y", body)], THREE, number("few", 2, INT64))
    model = _wrapped([_loop("three", "x", "y", body)], THREE, number("few", 3, INT64))
    assert np.abs(passes_of(model, X) - _steps(X[None], 3)).max() <= 1e-5


# -- loops -------------------------------------------------------------------------------------------------------------


def test_a_loop_may_count_in_a_list_of_one() -> None:
    model = _wrapped([_loop("three", "x", "y", STEP, counter=(1,))], THREE)
    assert np.abs(passes_of(model, X) - _steps(X[None], 3)).max() <= 1e-5


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("kind", "off"), [(TensorProto.DOUBLE, 1e-6), (TensorProto.FLOAT16, 2e-2)])
def test_what_a_body_makes_is_masked_in_its_own_type(kind: int, off: float, opset: int) -> None:
    body = [
        helper.make_node("Neg", ["h"], ["minus"]),
        _dropout("minus", "some"),
        helper.make_node("RandomNormalLike", ["some"], ["noise"]),
        helper.make_node("Add", ["some", "noise"], ["next"]),
    ]
    model = _wrapped([_loop("one", "x", "y", body, kind=kind)], number("one", 1, INT64), dtype=kind, opset=opset)
    site = mcdrop.Site("site1", (6,), 0.0, "normal")
    noise = mcdrop.sample_masks([site], 20, seed=5, start=3, sampler="balanced")["site1"][:, None]
    assert np.abs(passes_of(model, X) - (noise - dropped(X))).max() <= off


@pytest.mark.parametrize("said", [{}, {"scan_output_axes": [1]}, {"scan_output_directions": [1]}])
def test_a_scan_may_say_how_its_outputs_are_laid_out(said: dict[str, Any]) -> None:
    nodes = [_dropout("h", "next"), helper.make_node("Identity", ["next"], ["out"])]
    inputs = [_info("h"), _info("one", shape=(6,))]
    body = helper.make_graph(nodes, "body", inputs, [_info("next"), _info("out")])
    outer = [
        helper.make_node("Scan", ["x", "steps"], ["last", "all"], body=body, num_scan_inputs=1, **said),
        helper.make_node("ReduceSum", ["all", "axis"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "last"], ["y"]),
    ]
    axis = said.get("scan_output_axes", [0])
    model = _wrapped(outer, number("steps", np.zeros((2, 6))), number("axis", axis, INT64))
    assert np.abs(passes_of(model, X) - _steps(X[None], 1)).max() <= 1e-5


def test_a_scan_of_old_operators_is_refused_with_what_would_work() -> None:
    body = helper.make_graph(
        [helper.make_node("Dropout", ["h"], ["next"])], "body",
        [_info("h"), _info("one", shape=(6,))], [_info("next")],
    )  # fmt: skip
    node = helper.make_node("Scan", ["x", "steps"], ["y"], body=body, num_scan_inputs=1)
    with pytest.raises(UncontrolledDraw, match="opset 11 or later"):
        _wrapped([node], number("steps", np.zeros((2, 6))), opset=9)


def _counted() -> Any:
    """Dropout in two loops of as many steps as the largest ``first`` and ``second`` say, and once after them."""
    outer = [
        helper.make_node("ReduceMax", ["first"], ["most"], keepdims=0),
        helper.make_node("ReduceMax", ["second"], ["more"], keepdims=0),
        _loop("most", "x", "a", STEP),
        _loop("more", "a", "b", STEP),
        _dropout("b", "y"),
    ]
    given = [_info("x"), _info("first", INT64, ("n",)), _info("second", INT64, ("n",))]
    graph = helper.make_graph(outer, "counted", given, [_info("y")], [P, YES])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_masks_do_not_depend_on_how_many_steps_were_seen_first() -> None:
    rows = (X, np.full(4, 1), np.full(4, 2))
    seen = [rows, (X, np.full(4, 3), np.full(4, 2)), (X, np.full(4, 2), np.full(4, 4))]
    first, *others = [passes_of(mcdrop.wrap(_counted(), example=example), rows) for example in seen]
    expected = dropped(X)  # the loops come after what always happens, by turns
    for site in ("site1", "site2", "site4"):
        expected = expected * dropped(ONES, site=site)
    assert np.abs(first - expected).max() <= 1e-5
    for other in others:
        assert np.array_equal(first, other)


# -- what rows share ---------------------------------------------------------------------------------------------------

SCALED = [
    helper.make_node("Abs", ["some"], ["size"]),
    helper.make_node("ReduceMax", ["size"], ["most"], keepdims=0),
    helper.make_node("Max", ["most", "limit"], ["by"]),
    helper.make_node("Div", ["some", "by"], ["next"]),
]
QUANTISED = [
    helper.make_node("DynamicQuantizeLinear", ["some"], ["levels", "scale", "zero"]),
    helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["next"]),
]
SHARED: dict[str, list[Any]] = {
    "a scale at the top": [_dropout("x", "some"), *SCALED[:-1], helper.make_node("Div", ["some", "by"], ["y"])],
    "a scale in a loop": [_loop("one", "x", "y", [_dropout("h", "some"), *SCALED])],
    "levels at the top": [_dropout("x", "some"), QUANTISED[0],
                          helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["y"])],
    "levels in a loop": [_loop("one", "x", "y", [_dropout("h", "some"), *QUANTISED])],
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_a_pass_does_not_change_with_the_passes_beside_it(case: str) -> None:
    """The example is too small, or too alike, to show that rows share a scale."""
    alike = np.repeat(X[:1], 4, axis=0) * 0.01
    model = _wrapped(SHARED[case], number("one", 1, INT64), number("limit", 0.1), example=alike)
    rows = model.rows(30 * X)
    ask: dict[str, Any] = {"seed": 5, "sampler": "iid"}
    together = model.backend.forward(rows, 20, start=0, **ask)
    alone = [model.backend.forward(rows, 1, start=t, **ask)[0] for t in range(20)]
    assert np.abs(together - np.stack(alone)).max() <= 1e-6


def test_reducing_within_a_row_in_a_loop_still_shares_a_batch() -> None:
    body = [
        _dropout("h", "some"),
        helper.make_node("ReduceMean", ["some"], ["middle"], axes=[1]),
        helper.make_node("Sub", ["some", "middle"], ["next"]),
    ]
    assert _wrapped([_loop("three", "x", "y", body)], THREE).audit.tier == "fold"


# -- what is written into a graph --------------------------------------------------------------------------------------


def test_a_rate_that_is_cast_to_a_whole_number_is_that_number() -> None:
    nodes = [
        helper.make_node("Cast", ["most"], ["whole"], to=INT64),
        helper.make_node("Cast", ["whole"], ["rate"], to=FLOAT),
        helper.make_node("Dropout", ["x", "rate", "yes"], ["all"]),
        _dropout("all", "y"),
    ]
    model = _wrapped(nodes, number("most", 0.875))
    assert [site.p for site in model.audit.sites] == [0.0, 0.25]
    assert np.abs(passes_of(model, X) - dropped(X, site="site1")).max() <= 1e-6


def _with_an_input_that_nothing_reads() -> Any:
    graph = parsed(by_hand([_dropout("x", "y")], initial=(P, YES)))
    graph.graph.input.append(_info("extra", shape=("n", 2)))
    return graph


@pytest.mark.parametrize(
    "example", [X, (X, ONES[:, :2]), {"x": X, "extra": ONES[:, :2]}], ids=["left", "both", "named"]
)
def test_an_input_that_nothing_reads_may_be_given_or_left_out(example: Any) -> None:
    model = mcdrop.wrap(_with_an_input_that_nothing_reads(), example=example)
    assert np.abs(passes_of(model, example) - dropped(X)).max() <= 1e-6
    with pytest.raises(InputError, match="input"):
        mcdrop.predict(model, (X, X, X))
