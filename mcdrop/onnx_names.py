"""One name for each value of an ONNX graph, and the constants by their names.

Bodies of If, Loop and Scan may use a name again that another body has for something else, such as the rates of two
dropouts. After ``distinct_names`` a name says which value is meant, wherever it is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mcdrop.errors import ArtifactError, ModelRefused
from mcdrop.onnx_graph import Graph, bodies, every_graph, walk

__all__ = ["MASK", "Constants", "constants", "distinct_names", "number"]

MASK = "mcdrop.mask"  # what names of inputs for masks begin with

_WHOLE = (
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
)

Constants = dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """A constant that is cast to whole numbers: a rate of 0.9 is 0 then. Casts to real numbers keep what was meant."""

    of: Any
    to: int


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
    """What is written into the model: initializers, Constant nodes, and casts and copies of those.

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
    return known


def number(known: Constants, name: str) -> NDArray[Any] | None:
    """Gives a constant, None for what is not known before the graph runs.

    Raises:
        ArtifactError: it is damaged.
    """
    value, casts = known.get(name), list[int]()
    while isinstance(value, _Whole):
        value, casts = value.of, [value.to, *casts]
    if value is None:
        return None
    try:
        found = np.asarray(numpy_helper.to_array(value) if hasattr(value, "dims") else value)
        for to in casts:
            with np.errstate(invalid="ignore"):
                found = found.astype(helper.tensor_dtype_to_np_dtype(to))
        as_known = {"b": np.uint8, "V": np.float32}.get(found.dtype.kind)  # V: types that numpy itself lacks
        return found if as_known is None else found.astype(as_known)
    except Exception as error:  # whatever a tensor's type and bytes make of each other
        raise ArtifactError(f"the constant {name!r} of the graph is damaged: {error}") from error
