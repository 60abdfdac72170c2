"""What a graph takes, and files of graphs: old, odd, damaged."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from graphs import X, built, by_hand, dropped, exported, number, parsed, passes_of
from onnx import TensorProto, helper, numpy_helper

import mcdrop
from mcdrop.errors import ArtifactError, InputError, ModelNotFound, ModelRefused
from mcdrop.wrapping import wrap_graph

FLOAT = TensorProto.FLOAT


# -- old forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 12, 13, 14])
def test_batch_norm_in_training_form_uses_its_running_statistics(opset: int) -> None:
    outputs = ["normed", "mean2", "var2"] + ["mean3", "var3"] * (opset < 14)
    mode: dict[str, Any] = {"training_mode": 1} if opset >= 14 else {}
    rate: dict[str, Any] = {"ratio": 0.25} if opset < 12 else {}
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], outputs, epsilon=0.0, **mode),
        helper.make_node("Dropout", ["normed", "p"][: 2 - bool(rate)], ["y"], **rate),
    ]
    given = {"scale": 2.0, "bias": 1.0, "mean": 3.0, "var": 4.0}
    initial = [number(name, np.full(6, value)) for name, value in given.items()]
    model = mcdrop.wrap(parsed(by_hand(nodes, opset=opset, initial=(*initial, number("p", 0.25)))), example=X)
    assert [*model.audit.kept] == ["BatchNormalization:normed"]
    assert np.abs(passes_of(model, X) - dropped((X - 3) / 2 * 2 + 1)).max() <= 1e-5


def _with_weights_as_inputs() -> Any:
    nodes = [
        helper.make_node("Mul", ["x", "weight"], ["wide"]),
        helper.make_node("Dropout", ["wide"], ["z"], ratio=0.25),
        helper.make_node("Add", ["z", "bias"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in
             (("x", [4, 6]), ("weight", [6]), ("bias", [6]))]  # fmt: skip
    made = [helper.make_tensor_value_info("y", FLOAT, [4, 6])]
    initial = [number("weight", [2.0] * 6), number("bias", [1.0] * 6)]
    graph = helper.make_graph(nodes, "old", infos, made, initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)], ir_version=3)


def test_weights_that_are_inputs_too_are_not_asked_for() -> None:
    for example in (X, None):
        model = mcdrop.wrap(_with_weights_as_inputs(), example=example)
        assert [spec.name for spec in model.inputs] == ["x"]
        assert np.abs(passes_of(model, X) - (dropped(2 * X) + 1)).max() <= 1e-5


# -- numbers -----------------------------------------------------------------------------------------------------------


def _of_type(kind: int) -> Any:
    nodes = [
        helper.make_node("Cast", ["x"], ["real"], to=FLOAT),
        helper.make_node("Dropout", ["real", "p"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=kind),
    ]
    model = parsed(by_hand(nodes, dtype=kind, initial=(number("p", 0.25),)))
    model.graph.node.pop()
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "z", FLOAT
    return model


@pytest.mark.parametrize(("kind", "fits", "not_held"), [
    (TensorProto.FLOAT16, 6e4, 1e6),
    (TensorProto.INT32, 2**31 - 1, 2**40),
    (TensorProto.INT64, 3, 0.5),
    (TensorProto.UINT8, 255, -1),
])  # fmt: skip
def test_numbers_that_a_type_does_not_hold_are_refused(kind: int, fits: float, not_held: float) -> None:
    rows = np.full((4, 6), float(fits))
    model = mcdrop.wrap(_of_type(kind), example=rows)
    assert np.isfinite(mcdrop.predict(model, rows).mean).all()
    rows[1, 2] = not_held
    with pytest.raises(InputError, match="'x'"):
        mcdrop.predict(model, rows)
    with pytest.raises(InputError, match="does not hold"):
        mcdrop.wrap(_of_type(kind), example=rows)


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.STRING])
def test_a_type_that_numpy_does_not_have_is_refused(kind: int) -> None:
    with pytest.raises(ModelRefused, match="which numpy does not have; let the graph take float32"):
        mcdrop.wrap(_of_type(kind), example=X)


def test_an_input_that_is_no_tensor_is_refused_by_what_it_is() -> None:
    nodes = [helper.make_node("SequenceAt", ["x", "i"], ["h"]), helper.make_node("Dropout", ["h"], ["y"])]
    model = parsed(by_hand(nodes, initial=(number("i", 0, TensorProto.INT64),)))
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", FLOAT, ["n", 6]))
    with pytest.raises(ModelRefused, match="input 'x' is a sequence, no tensor of numbers"):
        mcdrop.wrap(model, example=X)


def test_rows_that_the_runtime_does_not_take_are_an_error_of_ours() -> None:
    nodes = [helper.make_node("Gather", ["table", "x"], ["found"]), helper.make_node("Dropout", ["found", "p"], ["z"])]
    model = parsed(by_hand(nodes, dtype=TensorProto.INT64, initial=(number("p", 0.25), number("table", [1.0] * 9))))
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "z", FLOAT
    wrapped = mcdrop.wrap(model, example=np.zeros((4, 6), int))
    with pytest.raises(InputError, match="cannot take these rows"):
        mcdrop.predict(wrapped, np.full((4, 6), 9))


@pytest.mark.parametrize("shape", [["n", 2**33], ["n"] + [None] * 13])
def test_rows_that_would_be_too_large_are_not_made_up(shape: list[Any]) -> None:
    model = parsed(by_hand([helper.make_node("Dropout", ["x"], ["y"])]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, shape))
    with pytest.raises(InputError, match="give some as example="):
        mcdrop.wrap(model, example=None)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("example", [None, X, X[:1], np.tile(X, (2, 1))], ids=["none", "4", "1", "8"])
def test_a_graph_of_one_number_of_rows_is_refused_for_that_whatever_the_example(rows: int, example: Any) -> None:
    shape = number("shape", [rows, 6], TensorProto.INT64)
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["h"]), helper.make_node("Dropout", ["h"], ["y"])]
    model = parsed(by_hand(nodes, initial=(shape,)))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, [rows, 6]))
    with pytest.raises(ModelRefused, match=r"takes one number of rows only.*export it with a dynamic first axis"):
        mcdrop.wrap(model, example=example)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_row_that_a_graph_does_not_take_is_not_blamed_on_the_number_of_rows(rows: int, bad: int) -> None:
    nodes = [helper.make_node("Gather", ["table", "x"], ["found"]), helper.make_node("Dropout", ["found", "p"], ["z"])]
    model = parsed(by_hand(nodes, dtype=TensorProto.INT64, initial=(number("p", 0.25), number("table", [1.0] * 9))))
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "z", FLOAT
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = rows
    example = np.zeros((4, 6), int)
    example[bad] = 9
    with pytest.raises(InputError, match="cannot take inputs of shape"):
        mcdrop.wrap(model, example=example)


# -- files -------------------------------------------------------------------------------------------------------------


def _link(path: Path) -> None:
    (path.parent / "there.onnx").write_bytes(exported("mlp"))
    path.symlink_to(path.parent / "there.onnx")


def _program() -> bytes:
    module, x = built("mlp")
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), buffer)
    return buffer.getvalue()


NO_GRAPHS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (lambda path: None, ModelNotFound, "there is no file"),
    "a folder": (Path.mkdir, ArtifactError, "plain file"),
    "a link": (_link, ArtifactError, "plain file"),
    "a pipe": (os.mkfifo, ArtifactError, "plain file"),
    "a pickle": (lambda path: torch.save(built("mlp")[0], path), ArtifactError, "is a pickle"),
    "a program": (
        lambda path: path.write_bytes(_program()), ArtifactError, r"read it with mcdrop\.load",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_GRAPHS)
def test_wrap_reads_a_file_with_the_care_of_load(case: str, tmp_path: Path) -> None:
    make, error, said = NO_GRAPHS[case]
    path = tmp_path / "net.onnx"
    make(path)
    with pytest.raises(error, match=said):
        mcdrop.wrap(path, example=X)  # type: ignore[arg-type]


def _names_no_text(model: Any) -> bytes:
    model.graph.node[0].name = "marked"
    return bytes(model.SerializeToString()).replace(b"marked", b"\xff\xfe\xfd\xfc\xfb\xfa")


def _rate_of_no_type(model: Any) -> bytes:
    model.graph.initializer[0].CopyFrom(TensorProto(name="p", data_type=99, raw_data=bytes(4)))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("damage", [_names_no_text, _rate_of_no_type])
def test_a_damaged_graph_is_an_error_of_ours(damage: Callable[[Any], bytes], tmp_path: Path) -> None:
    data = damage(parsed(by_hand([helper.make_node("Dropout", ["x", "p"], ["y"])], initial=(number("p", 0.25),))))
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        mcdrop.wrap(path, example=X)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", ["[[1e400, 2]]", "[" * 100_000, '[["a", 1]]'], ids=["endless", "deep", "no number"])
def test_what_a_graph_says_wrongly_of_its_draws_is_not_heard(said: str) -> None:
    model = parsed(by_hand([helper.make_node("Dropout", ["x", "p"], ["y"])], initial=(number("p", 0.25),)))
    entry = model.metadata_props.add()
    entry.key, entry.value = "mcdrop.sites", said
    assert np.abs(passes_of(mcdrop.wrap(model, example=X), X) - dropped(X)).max() <= 1e-6


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.INT64])
def test_outputs_that_float32_would_round_keep_their_digits(kind: int) -> None:
    """The variance of 2 m + c at p = 0.5 is 1, whatever c is; in float32 nothing of it would be left."""
    nodes = [
        helper.make_node("Dropout", ["x", "p", "on"], ["z"]),
        helper.make_node("Cast", ["z"], ["wide"], to=kind),
        helper.make_node("Add", ["wide", "far"], ["y"]),
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    graph = helper.make_graph(
        nodes, "far", [helper.make_tensor_value_info("x", FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", kind, ["n", 3])],
        [number("p", 0.5), numpy_helper.from_array(np.array(True), "on"),
         numpy_helper.from_array(np.array(10**9, dtype), "far")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x, passes = np.ones((2, 3), np.float32), 2000
    model = mcdrop.wrap(parsed(made.SerializeToString()), example=x, output="y")
    found = mcdrop.sample(model, x, mcdrop.PassPlan(passes, 0, "iid"))
    # the squares of 2 m - 1 are 1: only the mean's own error, 1 / T, is left
    np.testing.assert_allclose(found.variance, 1.0, atol=20 / passes)
    assert found.deterministic is not None
    np.testing.assert_allclose(found.deterministic, 10**9 + 1, rtol=1e-15)


OUTPUTS = {
    "scalar": ([helper.make_node("ReduceMean", ["y"], ["other"], keepdims=0)], "one number for all rows"),
    "constant": ([helper.make_node("Relu", ["p"], ["other"])], "'other' is a constant.*: y"),
    "initial": ([], "'p' is a constant.*: y"),
    "input": ([], "'x' is an input that is handed on.*: y"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_without_the_rows_or_without_draws_is_refused(case: str) -> None:
    nodes, said = OUTPUTS[case]
    name = {"initial": "p", "input": "x"}.get(case, "other")
    model = parsed(by_hand([helper.make_node("Dropout", ["x", "p"], ["y"]), *nodes], initial=(number("p", 0.25),)))
    shape: list[Any] = ["n", 6] if case == "input" else []
    model.graph.output.append(helper.make_tensor_value_info(name, FLOAT, shape))
    with pytest.raises(InputError, match=said):
        wrap_graph(model, example=X, output=name)


def test_where_there_is_no_other_output_none_is_offered() -> None:
    nodes = [helper.make_node("Dropout", ["x", "p"], ["z"]), helper.make_node("Relu", ["p"], ["y"])]
    with pytest.raises(InputError, match=r"'y' is a constant, which no draw changes$"):
        mcdrop.wrap(parsed(by_hand(nodes, initial=(number("p", 0.25),))), example=X)


def _with_a_sequence() -> Any:
    nodes = [helper.make_node("Dropout", ["x", "p"], ["y"]), helper.make_node("SequenceConstruct", ["y", "y"], ["all"])]
    model = parsed(by_hand(nodes, initial=(number("p", 0.25),)))
    model.graph.output.append(helper.make_tensor_sequence_value_info("all", FLOAT, None))
    return model


def test_an_output_that_is_no_tensor_is_refused_and_not_offered() -> None:
    model = _with_a_sequence()
    assert np.abs(passes_of(mcdrop.wrap(model, example=X), X) - dropped(X)).max() <= 1e-6
    with pytest.raises(InputError, match=r"'all' is a sequence.*zipmap.*choose another with output=: y$"):
        wrap_graph(model, example=X, output="all")
    both = [*model.graph.output]
    del model.graph.output[0]
    with pytest.raises(InputError, match=r"'all' is a sequence.*'zipmap': False}\)$"):
        wrap_graph(model, example=X, output="all")
    with pytest.raises(InputError, match=r"has no output of numbers; the output 'all' is a sequence"):
        mcdrop.wrap(model, example=X)
    del model.graph.output[:]
    model.graph.output.extend([*both, helper.make_tensor_value_info("x", FLOAT, ["n", 6])])
    with pytest.raises(InputError, match=r"has the outputs y, x; choose one with output=; the output 'all' is a seq"):
        mcdrop.wrap(model, example=X)


def test_an_input_without_rows_is_to_be_a_constant() -> None:
    nodes = [helper.make_node("Dropout", ["x", "p"], ["d"]), helper.make_node("Where", ["training", "d", "x"], ["y"])]
    model = parsed(by_hand(nodes, initial=(number("p", 0.25),)))
    model.graph.input.append(helper.make_tensor_value_info("training", TensorProto.BOOL, []))
    with pytest.raises(InputError, match=r"'training' is one number for all rows.*an initializer"):
        mcdrop.wrap(model, example=X)
    del model.graph.input[1]
    model.graph.initializer.append(number("training", True, TensorProto.BOOL))
    assert np.abs(passes_of(mcdrop.wrap(model, example=X), X) - dropped(X)).max() <= 1e-6


def test_what_torch_gives_for_an_export_can_be_wrapped() -> None:
    source = by_hand([helper.make_node("Dropout", ["x", "p"], ["y"])], initial=(number("p", 0.25),))
    program = torch.onnx.ONNXProgram(onnx_ir.from_proto(parsed(source)), None)
    assert np.abs(passes_of(mcdrop.wrap(program, example=X), X) - dropped(X)).max() <= 1e-6  # type: ignore[arg-type]
