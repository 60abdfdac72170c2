"""What an ONNX graph takes and gives: its inputs, rows that fit them, and the output that is read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mcdrop.errors import InputError, ModelRefused, UnknownName
from mcdrop.onnx_graph import following
from mcdrop.rows import Rows

__all__ = ["PERCEPTRON", "GraphInput", "fed", "graph_inputs", "hidden", "made_up", "picked", "placed"]

PERCEPTRON = "mcdrop.perceptron"  # metadata of a graph whose network had linear layers alone

_FREE = 8  # size of an axis that the graph leaves open, for rows that are made up
_MADE_UP = 4  # rows
_MOST = 2**26  # numbers that are made up for an input
_KINDS = "biuf"
_AGAIN = (
    "the output {} is a sequence, a map or text, no tensor of numbers; convert the model again so that it is one "
    "(skl2onnx: options={{'zipmap': False}})"
)


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph: its name, numpy type, and shape with -1 for the rows and None for what is open."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def graph_inputs(infos: Iterable[Any]) -> tuple[GraphInput, ...]:
    """Gives what a graph takes."""
    found = []
    for info in infos:
        dtype = _dtype(info).name
        # a size below 1 stands for what an exporter did not know
        sizes = [axis.dim_value if axis.dim_value > 0 else None for axis in info.type.tensor_type.shape.dim]
        if not sizes:
            raise InputError(
                f"input {info.name!r} is one number for all rows, with no axis for them; make it a constant of the "
                "graph (an initializer) before wrapping"
            )
        found.append(GraphInput(info.name, "float32" if dtype == "float16" else dtype, (-1, *sizes[1:])))
    return tuple(found)


def _dtype(info: Any) -> np.dtype[Any]:
    """The numpy type of an input."""
    kind = info.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        raise ModelRefused(
            f"input {info.name!r} is a {kind.removesuffix('_type').replace('_', ' ')}, no tensor of numbers; let the "
            "graph take its tensors as inputs of their own"
        )
    code = info.type.tensor_type.elem_type
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(code))
    except (KeyError, TypeError):
        dtype = np.dtype(object)
    if dtype.kind not in _KINDS:
        try:
            said = helper.tensor_dtype_to_string(code).removeprefix("TensorProto.")
        except KeyError:
            said = f"number {code}" if code else "no tensor's"
        raise ModelRefused(
            f"input {info.name!r} is of the type {said}, which numpy does not have; let the graph take float32 and "
            "begin with a Cast"
        )
    return dtype


def fed(leaf: Any, info: Any) -> NDArray[Any]:
    """Gives a leaf of rows in the type of its input.

    Raises:
        InputError: it holds a number that the type does not have.
    """
    array = leaf.detach().cpu().numpy() if hasattr(leaf, "detach") else np.asarray(leaf)
    dtype = _dtype(info)
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = np.ascontiguousarray(array, dtype)
        changed = np.isinf(fitted) & np.isfinite(array) if dtype.kind == "f" else fitted != array
    if dtype.kind != "b" and changed.any():
        raise InputError(f"input {info.name!r} is of the type {dtype}, which does not hold {array[changed][0]:g}")
    return fitted


def placed(rows: Rows, inputs: Sequence[GraphInput]) -> Rows:
    """Puts rows that were given by name in the order of the inputs."""
    names, leaves = [one.name for one in inputs], [*rows.leaves]
    if rows.kwargs and sorted(rows.kwargs) == sorted(names):
        leaves = [rows.kwargs[name] for name in names]
    if len(leaves) != len(names):
        raise InputError(f"the graph takes {len(names)} inputs: {', '.join(names)}; got {len(leaves)}")
    return Rows(tuple(leaves), {}, rows.count)


def made_up(inputs: Sequence[GraphInput]) -> Rows:
    """Rows of the right shapes: normal numbers, for whole numbers zeros and ones, for booleans true.

    Raises:
        InputError: an input is too large to be made up.
    """
    generator = np.random.Generator(np.random.Philox(0))
    leaves = []
    for one in inputs:
        shape = (_MADE_UP, *(_FREE if size is None else size for size in one.shape[1:]))
        if math.prod(shape) > _MOST:
            raise InputError(f"input {one.name!r} is too large for rows that are made up; give some as example=")
        kind = np.dtype(one.dtype).kind
        made = generator.standard_normal(shape) if kind == "f" else generator.integers(0, 2, shape)
        leaves.append(np.ones(shape, bool) if kind == "b" else made.astype(one.dtype))
    return Rows.of(tuple(leaves))


def picked(model: Any, output: str | int | None) -> str:
    """Gives the name of the output that is read: the one that was asked for, or the only floating one.

    Raises:
        InputError: none was asked for and there are several, or it is no answer to the rows.
        UnknownName: there is none of that name.
    """
    name, strange = _asked_for(model, output), _no_tensors(model)
    others = ", ".join(info.name for info in model.graph.output if info.name not in (name, *strange))
    choose = f"choose another with output=: {others}" if others else ""
    handed_on = name in {info.name for info in model.graph.input}
    if handed_on or name not in following(model.graph):
        what = "an input that is handed on" if handed_on else "a constant"
        raise InputError(f"the output {name!r} is {what}, which no draw changes" + f"; {choose}" * bool(choose))
    if name in strange:
        raise InputError(_AGAIN.format(repr(name)) + f"; or {choose}" * bool(choose))
    return name


def _no_tensors(model: Any) -> list[str]:
    """The outputs that are no tensors of numbers."""
    kinds = {str(info.name): info.type for info in model.graph.output}
    other = {name for name, kind in kinds.items() if kind.WhichOneof("value") not in ("tensor_type", None)}
    return [name for name, kind in kinds.items() if name in other or kind.tensor_type.elem_type == TensorProto.STRING]


def _asked_for(model: Any, output: str | int | None) -> str:
    names = [info.name for info in model.graph.output]
    if isinstance(output, int) and not isinstance(output, bool) and 0 <= output < len(names):
        return str(names[output])
    if output in names:
        return str(output)
    if output is not None:
        raise UnknownName("output", output, names)
    floating = [info.name for info in model.graph.output if info.type.tensor_type.elem_type in (1, 10, 11, 16)]
    if len(floating) != 1 and "logits" not in floating:
        strange = _no_tensors(model)
        said = f"; {_AGAIN.format(', '.join(map(repr, strange)))}" * bool(strange)
        choices = ", ".join(one for one in names if one not in strange)
        has = f"the outputs {choices}; choose one with output=" if choices else "no output of numbers"
        raise InputError(f"the graph has {has}{said}")
    return "logits" if "logits" in floating and len(floating) > 1 else str(floating[0])


def hidden(model: Any) -> str:
    """Gives the name of the value whose numbers are features: what enters the last matrix product.

    Of a graph that says that it was a perceptron it is what enters the second one (see ``hidden_features``).
    """
    products = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    if not products:
        raise InputError(
            "no matrix product runs in this graph; name the node whose output are the features with layer="
        )
    perceptron = any(entry.key == PERCEPTRON for entry in model.metadata_props)
    return str(products[1 if perceptron and len(products) > 1 else -1].input[0])
