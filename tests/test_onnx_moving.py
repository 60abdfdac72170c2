"""Draws of as many entries as values say are refused, and rows of a graph that depend on each other are named."""

from typing import Any

import numpy as np
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from onnx import TensorProto, helper

import mcdrop
from mcdrop.errors import UncontrolledDraw

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
P, ZERO, NONE = number("p", 0.25), number("zero", 0, INT64), number("none", 0.0)


def _node(operator: str, inputs: str, outputs: str, **given: Any) -> Any:
    return helper.make_node(operator, inputs.split(), outputs.split(), **given)


def _wrapped(nodes: list[Any], *initial: Any) -> mcdrop.Model:
    return mcdrop.wrap(parsed(by_hand(nodes, initial=(P, ZERO, NONE, *initial))), example=np.abs(X))


# -- counted -----------------------------------------------------------------------------------------------------------

PICKED = [  # the numbers above zero of all rows in a row
    _node("Greater", "x none", "above"),
    _node("NonZero", "above", "places"),
    _node("Transpose", "places", "at"),
    _node("GatherND", "x at", "some"),
]
SIZED = [  # a size that rows say
    _node("ReduceMax", "x", "largest", keepdims=0),
    _node("Cast", "largest", "size", to=INT64),
    _node("Unsqueeze", "size zeros", "sizes"),
]
ZEROS, ONES, FLAT = number("zeros", [0], INT64), number("ones", [1], INT64), number("flat", [-1], INT64)
COUNTED = {
    "NonZero": [*PICKED, _node("Dropout", "some p", "z"), _node("ScatterND", "x at z", "y")],
    "Compress": [
        *PICKED[:1], _node("Reshape", "above flat", "which"), _node("Compress", "x which", "some"),
        _node("Dropout", "some p", "z"), _node("ReduceSum", "z", "sum"), _node("Add", "x sum", "y"),
    ],
    "Slice": [
        *SIZED, _node("Slice", "x zeros sizes ones", "part"), _node("Dropout", "part p", "z"),
        _node("ReduceSum", "z ones", "sum"), _node("Add", "x sum", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_a_draw_of_as_many_entries_as_values_say_is_refused(case: str) -> None:
    with pytest.raises(UncontrolledDraw, match=rf"draws follows from the values of the rows \({case} "):
        _wrapped(COUNTED[case], ZEROS, ONES, FLAT)


def test_what_is_back_in_rows_is_drawn_for_as_ever() -> None:
    nodes = [*PICKED, _node("Neg", "some", "z"), _node("ScatterND", "x at z", "back"), _node("Dropout", "back p", "y")]
    assert np.abs(passes_of(_wrapped(nodes), X) - dropped(-np.abs(X) * (X > 0) + X * (X <= 0))).max() <= 1e-6


SHAPE = _node("Shape", "x", "shape")
BACK = {
    "as many rows": [
        SHAPE, *PICKED, _node("Slice", "shape zeros ones", "rows"), _node("Concat", "rows left", "sizes", axis=0),
        _node("Reshape", "some sizes", "z"),
    ],
    "the shape of the rows": [SHAPE, *PICKED, _node("Reshape", "some shape", "z")],
    "places": [
        SHAPE, _node("Unique", "x", "own first inverse", sorted=1), _node("Gather", "own inverse", "flat"),
        _node("Reshape", "flat shape", "z"),
    ],
    "one number of all": [
        *PICKED, _node("ReduceMax", "some", "top", keepdims=0), _node("Mul", "x top", "scaled"),
        _node("Div", "scaled top", "z"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", BACK)
def test_picked_numbers_may_be_dropped_where_they_are_in_rows_again(case: str) -> None:
    """Each of them is again what was picked, since all numbers are above zero."""
    model = _wrapped([*BACK[case], _node("Dropout", "z p", "y")], ZEROS, ONES, number("left", [-1], INT64))
    assert np.abs(passes_of(model, np.abs(X)) - dropped(np.abs(X))).max() <= 1e-5


@pytest.mark.parametrize("sizes", [[-1, 6], [1, -1], [0]])
def test_numbers_left_over_for_an_axis_are_counted(sizes: list[int]) -> None:
    nodes = [*PICKED, _node("Reshape", "some sizes", "z"), _node("Dropout", "z p", "d"), _node("ReduceSum", "d", "s")]
    with pytest.raises(UncontrolledDraw, match="NonZero places"):
        _wrapped([*nodes, _node("Add", "x s", "y")], number("sizes", sizes, INT64))


def test_an_exporter_may_say_that_entries_left_over_are_the_rows() -> None:
    """Which is how one writes ``reshape(x.shape[0], 6)``."""
    graph = by_hand(
        [*PICKED, _node("Reshape", "some sizes", "z"), _node("Dropout", "z p", "y")],
        initial=(P, ZERO, NONE, number("sizes", [-1, 6], INT64)),
    )
    source = parsed(graph)
    rows = source.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    source.graph.value_info.append(helper.make_tensor_value_info("z", FLOAT, [rows, 6]))
    model = mcdrop.wrap(source, example=np.abs(X))
    assert np.abs(passes_of(model, np.abs(X)) - dropped(np.abs(X))).max() <= 1e-6


def test_what_a_loop_carries_is_counted_in_its_next_step() -> None:
    picked = [_node(one.op_type, " ".join(one.input).replace("x", "h"), one.output[0]) for one in PICKED]
    nodes = [_node("Dropout", "c p", "z"), _node("ReduceSum", "z", "sum"), _node("Add", "h sum", "next")]
    nodes += [*picked, _node("Identity", "some", "later"), _node("Identity", "on", "go")]
    shapes: dict[str, Any] = {
        "i": (INT64, []),
        "on": (TensorProto.BOOL, []),
        "h": (FLOAT, ["n", 6]),
        "c": (FLOAT, ["k"]),
    }
    shapes |= {"go": shapes["on"], "next": shapes["h"], "later": shapes["c"]}
    infos = {name: helper.make_tensor_value_info(name, *said) for name, said in shapes.items()}
    ends = [infos.pop(name) for name in ("go", "next", "later")]
    body = helper.make_graph(nodes, "body", [*infos.values()], ends)
    loop = helper.make_node("Loop", ["two", "", "x", "start"], ["y", "rest"], body=body)
    with pytest.raises(UncontrolledDraw, match=r"\(NonZero places"):
        _wrapped([loop], number("two", 2, INT64), number("start", [1.0]))


def test_sizes_of_rows_are_no_values() -> None:
    nodes = [
        _node("Shape", "x", "shape"),
        _node("ConstantOfShape", "shape", "blank", value=number("one", [1.0])),
        _node("Dropout", "blank p", "mask"),
        _node("Mul", "x mask", "y"),
    ]
    assert np.abs(passes_of(_wrapped(nodes), X) - dropped(X)).max() <= 1e-6


# -- coupled -----------------------------------------------------------------------------------------------------------

COUPLED = {
    "every draw off": [_node("Dropout", "x p", "z"), _node("CumSum", "z zero", "y")],
    "the same masks": [  # what was dropped is summed up, which is nothing where nothing is
        _node("Dropout", "x p", "z"), _node("Sub", "z x", "lost"), _node("CumSum", "lost zero", "sum"),
        _node("Add", "x sum", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", COUPLED)
def test_rows_that_depend_on_those_before_them_are_named(how: str) -> None:
    (said,) = _wrapped(COUPLED[how]).audit.warnings
    assert "depends on the other rows" in said
    assert how in said
    assert "row 1 of the example" in said  # the first has none before it


def test_rows_that_do_not_are_not() -> None:
    one = number("one", 1, INT64)
    assert _wrapped([_node("Dropout", "x p", "z"), _node("CumSum", "z one", "y")], one).audit.warnings == ()


def _quantised(what: str) -> list[Any]:
    nodes = [_node("DynamicQuantizeLinear", what, "q scale zero_point"), _node("DequantizeLinear", "q scale", "h")]
    return [*nodes, _node("Mul", "x h", "weighed"), _node("Dropout", "weighed p", "y")]


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_are_scaled_together_are_named_even_where_the_example_is_one_row(rows: int) -> None:
    (said,) = mcdrop.wrap(parsed(by_hand(_quantised("x"), initial=(P,))), example=X[:rows]).audit.warnings
    assert "depends on the other rows" in said


def test_weights_that_are_scaled_are_not() -> None:
    weights = number("weights", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert _wrapped(_quantised("weights"), weights).audit.warnings == ()
