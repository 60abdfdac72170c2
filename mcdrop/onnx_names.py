"""One name for each value of an ONNX graph, and the constants by their names.

Bodies of If, Loop and Scan may use a name again that another body has for something else, such as the rates of two
dropouts. After ``distinct_names`` a name says which value is meant, wherever it is read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mcdrop.errors import ArtifactError, ModelRefused
from mcdrop.onnx_graph import Graph, Place, bodies, every_graph, walk

__all__ = ["MASK", "REAL", "Constants", "constants", "distinct_names", "number"]

MASK = "mcdrop.mask"  # what names of inputs for masks begin with
REAL = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)

_WHOLE = (
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
)

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Div": np.divide, "Mul": np.multiply, "Neg": np.negative, "Sub": np.subtract,
}  # fmt: skip
_MOVES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")  # which leave one number what it is

Constants = dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """A constant that is cast to whole numbers: a rate of 0.9 is 0 then. Casts to real numbers keep what was meant."""

    of: Any
    to: int


@dataclass(frozen=True)
class _Computed:
    """A real number that follows from constants alone."""

    number: Any


def distinct_names(model: Any) -> None:
    """Renames, in place, values of bodies whose name another value has.

    Raises:
        ModelRefused: a value has a name that is kept for masks.
    """
    taken: set[str] = set()
    _settle(model.graph, {}, taken)
    ours = sorted(name for name in taken if name.startswith(MASK))
    if ours:
        raise ModelRefused(f"the graph has a value named {ours[0]!r}; {MASK}* are kept for masks, so rename it")


def _settle(graph: Graph, outer: Mapping[str, str], taken: set[str]) -> None:
    """Gives a graph's own values names that are not taken; those of the graphs around it are read by their new ones."""
    sparse = [one.values for one in graph.sparse_initializer]
    defined = [*graph.input, *graph.initializer, *sparse]
    own = dict.fromkeys([one.name for one in defined] + [name for node in graph.node for name in node.output if name])
    rename, known = dict(outer), {*taken, *own}
    for name in own:
        if name in taken:
            rename[name] = next(new for new in (f"{name}.{n}" for n in count(1)) if new not in known)
            known.add(rename[name])
    taken |= known
    for one in (*defined, *graph.output, *graph.value_info):
        one.name = rename.get(one.name, one.name)
    for node in graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
        for _, body in bodies(node):
            _settle(body, rename, taken)


def constants(model: Any) -> Constants:
    """What is written into the model: initializers, Constant nodes, casts and copies of those, numbers made of them.

    No name may stand for two values (see ``distinct_names``). ``number`` reads one.
    """
    known: Constants = {tensor.name: tensor for graph in every_graph(model.graph) for tensor in graph.initializer}
    for place in walk(model.graph):
        node = place.node
        if node.op_type == "Constant" and node.attribute:
            known[node.output[0]] = helper.get_attribute_value(node.attribute[0])
        elif node.op_type in ("Identity", "Cast") and node.input[0] in known:
            to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
            known[node.output[0]] = _Whole(known[node.input[0]], to) if to in _WHOLE else known[node.input[0]]
        elif (one := _computed(known, place)) is not None:
            known[node.output[0]] = _Computed(one)
    return known


def _computed(known: Constants, place: Place) -> NDArray[Any] | None:
    """What a node makes of real numbers, each alone; None where it takes or does anything else."""
    operator, names = place.operator, list(place.node.input)
    if operator in _MOVES:
        names = names[:1]
    elif operator not in _ARITHMETIC:
        return None
    found = [number(known, name, computed=True) for name in names if _is_real(known.get(name))]
    if not found or len(found) < len(names):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(_ARITHMETIC.get(operator, np.asarray)(*(one.reshape(()) for one in found if one is not None)))


def _is_real(value: Any) -> bool:
    """Whether a constant is a single real number."""
    if isinstance(value, TensorProto):
        return value.data_type in REAL and math.prod(value.dims) == 1
    return isinstance(value, float | _Computed)


def number(known: Constants, name: str, *, computed: bool = False) -> NDArray[Any] | None:
    """Gives a constant, None for what is not known before the graph runs, and unless asked for what is ``computed``.

    Raises:
        ArtifactError: it is damaged.
    """
    value, casts = known.get(name), list[int]()
    while isinstance(value, _Whole):
        value, casts = value.of, [value.to, *casts]
    # rates alone ask: a number compared with a computed level stays a uniform draw, as it is in artifacts; made a coin,
    # their seeds would give other masks
    if value is None or (isinstance(value, _Computed) and not computed):
        return None
    value = value.number if isinstance(value, _Computed) else value
    try:
        found = np.asarray(numpy_helper.to_array(value) if hasattr(value, "dims") else value)
        for to in casts:
            with np.errstate(invalid="ignore"):
                found = found.astype(helper.tensor_dtype_to_np_dtype(to))
        as_known = {"b": np.uint8, "V": np.float32}.get(found.dtype.kind)  # V: types that numpy itself lacks
        return found if as_known is None else found.astype(as_known)
    except Exception as error:  # whatever a tensor's type and bytes make of each other
        raise ArtifactError(f"the constant {name!r} of the graph is damaged: {error}") from error
