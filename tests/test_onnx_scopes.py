"""What a graph says in its bodies, rates and comparisons is what its passes do, or the graph is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from onnx import TensorProto, helper

import mcdrop
from mcdrop.errors import InputError, ModelRefused, UncontrolledDraw

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
ONES = np.ones((4, 6), np.float32)


def _info(name: str, kind: int = FLOAT, shape: Any = ("n", 6)) -> Any:
    return helper.make_tensor_value_info(name, kind, [*shape])


def _keep(p: float, passes: int = 20, site: str = "site0") -> Any:
    """The masks of one draw for all rows, (T, 1, 6)."""
    sites = [mcdrop.Site(site, (6,), p)]
    return mcdrop.sample_masks(sites, passes, seed=5, start=3, sampler="balanced")[site][:, None]


# -- names -------------------------------------------------------------------------------------------------------------


def _arm(rate: float, output: str) -> Any:
    """A branch whose constant has the same name as those of all others."""
    nodes = [
        helper.make_node("Constant", [], ["rate"], value=number("rate", rate)),
        helper.make_node("Dropout", ["x", "rate"], [output]),
    ]
    return helper.make_graph(nodes, output, [], [_info(output)])


def test_branches_that_use_a_name_again_keep_their_own_rates() -> None:
    nodes = [
        helper.make_node("If", ["yes"], ["a"], then_branch=_arm(0.125, "a1"), else_branch=_arm(0.25, "a2")),
        helper.make_node("If", ["yes"], ["b"], then_branch=_arm(0.5, "b1"), else_branch=_arm(0.75, "b2")),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    model = mcdrop.wrap(parsed(by_hand(nodes, initial=(number("yes", True, BOOL),))), example=X)
    first, second = model.audit.live
    assert (first.p, second.p) == (0.125, 0.5)
    expected = dropped(X, 0.125, first.name) - dropped(X, 0.5, second.name)
    assert np.abs(passes_of(model, X) - expected).max() <= 1e-6


def test_a_body_may_use_a_name_that_the_graph_around_it_has_later() -> None:
    nodes = [
        helper.make_node("If", ["yes"], ["a"], then_branch=_arm(0.25, "a1"), else_branch=_arm(0.5, "a2")),
        helper.make_node("Relu", ["a"], ["rate"]),
        helper.make_node("Neg", ["rate"], ["y"]),
    ]
    model = mcdrop.wrap(parsed(by_hand(nodes, initial=(number("yes", True, BOOL),))), example=X)
    expected = -np.maximum(dropped(X, 0.25, model.audit.live[0].name), 0)
    assert np.abs(passes_of(model, X) - expected).max() <= 1e-6


def test_a_name_that_masks_have_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["mcdrop.mask0"]), helper.make_node("Dropout", ["mcdrop.mask0"], ["y"])]
    with pytest.raises(ModelRefused, match="rename it"):
        mcdrop.wrap(parsed(by_hand(nodes)), example=X)


# -- loops -------------------------------------------------------------------------------------------------------------


def _counted_by_the_rows() -> Any:
    """A dropout in a loop of as many steps as the largest number of ``steps`` says."""
    inputs = [_info("i", INT64, ()), _info("going", BOOL, ()), _info("h")]
    nodes = [helper.make_node("Dropout", ["h", "p"], ["dropped"]), helper.make_node("Identity", ["going"], ["go"])]
    body = helper.make_graph(nodes, "body", inputs, [_info("go", BOOL, ()), _info("dropped")])
    outer = [
        helper.make_node("ReduceMax", ["steps"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "x"], ["y"], body=body),
    ]
    given = [_info("x"), _info("steps", INT64, ("n",))]
    graph = helper.make_graph(outer, "counted", given, [_info("y")], [number("p", 0.25)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loop_that_takes_more_steps_than_were_seen_is_refused(steps: int) -> None:
    model = mcdrop.wrap(_counted_by_the_rows(), example=(X, np.full(4, steps)))
    with pytest.raises(InputError, match="takes more steps"):
        mcdrop.predict(model, (X, np.full(4, 4)))


def test_a_loop_that_takes_fewer_steps_draws_the_masks_of_the_first() -> None:
    model = mcdrop.wrap(_counted_by_the_rows(), example=(X, np.full(4, 3)))
    expected = dropped(X) * dropped(ONES, site="site1")
    assert np.abs(passes_of(model, (X, np.full(4, 2))) - expected).max() <= 1e-6


def test_the_posterior_of_a_loop_is_written_and_takes_no_more_steps_either(tmp_path: Path) -> None:
    model = mcdrop.wrap(_counted_by_the_rows(), example=(X, np.full(4, 2)))
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=20)
    session = onnxruntime.InferenceSession(path)
    mean = session.run(["mean"], {"x": X, "steps": np.full(4, 2)})[0]
    assert np.abs(mean - mcdrop.predict(model, (X, np.full(4, 2)), passes=20).mean).max() <= 1e-5
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(["mean"], {"x": X, "steps": np.full(4, 3)})


def test_each_step_of_a_scan_draws_masks_of_its_own() -> None:
    nodes = [
        helper.make_node("Dropout", ["h", "p"], ["dropped"]),
        helper.make_node("Add", ["dropped", "one"], ["next"]),
    ]
    body = helper.make_graph(nodes, "body", [_info("h"), _info("one", shape=(6,))], [_info("next")])
    outer = [helper.make_node("Scan", ["x", "steps"], ["y"], body=body, num_scan_inputs=1)]
    steps = np.arange(12, dtype=np.float32).reshape(2, 6)
    data = by_hand(outer, initial=(number("p", 0.25), number("steps", steps)))
    expected = (dropped(X) + steps[0]) * dropped(ONES, site="site1") + steps[1]
    assert np.abs(passes_of(mcdrop.wrap(parsed(data), example=X), X) - expected).max() <= 1e-5


def test_draws_in_a_body_that_is_no_loop_and_no_branch_are_refused() -> None:
    body = helper.make_graph([helper.make_node("Dropout", ["e"], ["f"])], "each", [_info("e")], [_info("f")])
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["both"]),
        helper.make_node("SequenceMap", ["both"], ["mapped"], body=body),
        helper.make_node("ConcatFromSequence", ["mapped"], ["whole"], axis=0, new_axis=1),
        helper.make_node("ReduceSum", ["whole", "first"], ["y"], keepdims=0),
    ]
    with pytest.raises(UncontrolledDraw, match="in the body of a SequenceMap"):
        mcdrop.wrap(parsed(by_hand(nodes, initial=(number("first", [0], INT64),))), example=X)


def test_a_sequence_that_the_drawing_part_takes_is_refused() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["both"]),
        helper.make_node("Dropout", ["x", "p"], ["dropped"]),
        helper.make_node("SequenceInsert", ["both", "dropped"], ["three"]),
        helper.make_node("ConcatFromSequence", ["three"], ["whole"], axis=0, new_axis=1),
        helper.make_node("ReduceSum", ["whole", "first"], ["y"], keepdims=0),
    ]
    with pytest.raises(ModelRefused, match=r"both is a seq\("):
        mcdrop.wrap(parsed(by_hand(nodes, initial=(number("p", 0.25), number("first", [0], INT64)))), example=X)


# -- rates and comparisons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "said"), [
    (-0.25, "between 0 and 1, got -0.25"),
    (float("nan"), "between 0 and 1, got nan"),
    ([0.25, 0.25], "must be one number, got 2"),
])  # fmt: skip
def test_a_rate_that_is_none_is_refused(rate: Any, said: str) -> None:
    data = by_hand([helper.make_node("Dropout", ["x", "p"], ["y"])], initial=(number("p", rate),))
    with pytest.raises(UncontrolledDraw, match=said):
        mcdrop.wrap(parsed(data), example=X)


def _compared(operator: str, level: float, after: list[Any], **bounds: Any) -> bytes:
    """A uniform number between bounds, compared with a level; ``after`` makes y of the truth ``hit``."""
    nodes = [
        helper.make_node("RandomUniformLike", ["x"], ["u"], **bounds),
        helper.make_node(operator, ["u", "level"], ["hit"]),
        *after,
    ]
    return by_hand(nodes, initial=(number("level", level), number("yes", True, BOOL), number("none", 0.0)))


AS_NUMBER = [helper.make_node("Cast", ["hit"], ["kept"], to=FLOAT), helper.make_node("Mul", ["x", "kept"], ["y"])]
BY_WHOLE_NUMBERS = [
    helper.make_node("Cast", ["hit"], ["whole"], to=INT64),
    helper.make_node("Cast", ["whole"], ["kept"], to=FLOAT),
    helper.make_node("Mul", ["x", "kept"], ["y"]),
]
AS_TRUTH = [helper.make_node("Where", ["hit", "x", "none"], ["y"])]


@pytest.mark.parametrize(("operator", "level", "low", "high", "chance"), [
    ("Less", 0.75, 0.0, 1.0, 0.75),
    ("Less", 0.5, -1.0, 1.0, 0.75),
    ("Greater", 7.5, 0.0, 10.0, 0.25),
])  # fmt: skip
@pytest.mark.parametrize("after", [AS_NUMBER, BY_WHOLE_NUMBERS, AS_TRUTH], ids=["number", "whole", "truth"])
def test_a_comparison_hits_as_often_as_the_bounds_say(
    operator: str, level: float, low: float, high: float, chance: float, after: list[Any]
) -> None:
    model = mcdrop.wrap(parsed(_compared(operator, level, after, low=low, high=high)), example=X)
    assert model.audit.live[0].p == 1 - chance
    assert np.abs(passes_of(model, X) - X * _keep(1 - chance)).max() <= 1e-6
    off = round(chance) if after is AS_TRUTH else chance  # a truth has no expectation, so it is the likely one
    assert np.abs(model.backend.deterministic(model.example) - off * X).max() <= 1e-6


@pytest.mark.parametrize("level", [-0.75, 1.5])
def test_a_comparison_that_always_goes_one_way_is_no_live_draw(level: float) -> None:
    also = [
        helper.make_node("Cast", ["hit"], ["kept"], to=FLOAT),
        helper.make_node("Dropout", ["x"], ["half"]),
        helper.make_node("Add", ["half", "kept"], ["y"]),
    ]
    model = mcdrop.wrap(parsed(_compared("Less", level, also)), example=X)
    assert [site.path for site in model.audit.live] == ["Dropout:half"]
    expected = dropped(X, 0.5, model.audit.live[0].name) + (level > 1)
    assert np.abs(passes_of(model, X) - expected).max() <= 1e-6


def test_a_comparison_may_be_read_in_a_branch_too() -> None:
    then = helper.make_graph(
        [helper.make_node("Not", ["hit"], ["miss"]), helper.make_node("Cast", ["miss"], ["a"], to=FLOAT)],
        "then", [], [_info("a")],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "other", [], [_info("b")])
    nodes = [
        helper.make_node("Cast", ["hit"], ["kept"], to=FLOAT),
        helper.make_node("If", ["yes"], ["missed"], then_branch=then, else_branch=other),
        helper.make_node("Sub", ["kept", "missed"], ["y"]),
    ]
    model = mcdrop.wrap(parsed(_compared("Less", 0.75, nodes)), example=X)
    assert np.abs(passes_of(model, X) - (2 * _keep(0.25) - 1)).max() <= 1e-6


def test_a_uniform_number_that_a_branch_reads_too_stays_a_number() -> None:
    then = helper.make_graph([helper.make_node("Neg", ["u"], ["a"])], "then", [], [_info("a")])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "other", [], [_info("b")])
    nodes = [
        helper.make_node("Cast", ["hit"], ["kept"], to=FLOAT),
        helper.make_node("If", ["yes"], ["minus"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["kept", "minus"], ["y"]),
    ]
    model = mcdrop.wrap(parsed(_compared("Less", 0.75, nodes)), example=X)
    site = mcdrop.Site("site0", (6,), 0.0, "uniform")
    u = mcdrop.sample_masks([site], 20, seed=5, start=3, sampler="balanced")["site0"][:, None]
    assert np.abs(passes_of(model, X) - ((u < 0.75) - u)).max() <= 1e-6
