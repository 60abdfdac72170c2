"""What follows from the values of rows in an ONNX graph, not from their number and shape alone.

A loop may take other numbers of steps on other rows then, and a value may have other numbers of entries, of which
nothing says how many belong to which row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from mcdrop.onnx_bodies import loop_name
from mcdrop.onnx_graph import Graph, Node, bodies, reads

__all__ = ["Moving", "moving"]

_ALL = range(8)  # inputs
_SHAPED_BY: dict[str, Any] = {  # the inputs whose values say what shape an output has
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": _ALL,
    "Expand": (1,),
    "NonMaxSuppression": _ALL,
    "NonZero": _ALL,
    "OneHot": (1,),
    "Pad": (1,),
    "Range": _ALL,
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unique": _ALL,
    "Upsample": (1,),
}
_SHAPED_LIKE_FIRST = ("Scatter", "ScatterElements", "ScatterND")
_SAME_NUMBERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_INVERSE = 2  # the output of Unique that has an entry for each one given
_FEW = 16  # numbers, more than a shape has


@dataclass
class Moving:
    """The values that follow from values, the ``loops`` that end by them, and the nodes that count entries by them.

    ``counted`` has a node for each value whose shape follows from values. ``numbers`` has the entries of constants and
    of what is put together from them, None for what is no constant. ``in_rows`` are said to be in rows of one shape.
    """

    values: set[str]
    loops: set[str] = field(default_factory=set)
    counted: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, list[int | None]] = field(default_factory=dict)
    in_rows: frozenset[str] = frozenset()


def moving(graph: Graph) -> Moving:
    """Gives what follows from the values of the inputs.

    No name may stand for two values (see ``distinct_names``). Shapes that the graph states are to be those of values
    in rows of one shape: exporters infer that a number of entries is that of the rows, and may then leave it open.
    """
    found = Moving({info.name for info in graph.input}, in_rows=frozenset(info.name for info in graph.value_info))
    _walk(graph, found)
    return found


def _walk(graph: Graph, found: Moving) -> None:
    found.numbers |= {tensor.name: _entries(tensor) for tensor in graph.initializer}
    for node in graph.node:
        found.numbers |= dict.fromkeys(node.output[:1], _put_together(node, found))
        size = node.op_type in ("Shape", "Size")
        if found.values.isdisjoint(reads(node)) or (size and node.input[0] not in found.counted):
            continue
        found.values |= set(node.output) - {""}
        held = [*bodies(node)]
        for _, body in held:
            _into(node, body, found)
        if not held and not size:
            passed = next((found.counted[name] for name in _shaped_by(node, found) if name in found.counted), "")
            for place, name in enumerate(node.output):
                own = "" if (node.op_type, place) == ("Unique", _INVERSE) else _counts(node, found)
                if (why := passed or own) and name not in found.in_rows:
                    found.counted[name] = why
        found.counted.pop("", None)  # an output that is left out


def _into(node: Node, body: Graph, found: Moving) -> None:
    """Looks into a body; what a loop carries from one step to the next may be counted from the second step on."""
    loop = node.op_type == "Loop"
    own = [info.name for info in body.input[2 * loop :]]
    made = [info.name for info in body.output[loop:]]
    found.values |= {*own}
    _carry(found, node.input[2 * loop :], own)
    _walk(body, found)
    if _carry(found, made, own):
        _walk(body, found)
    if loop and not found.values.isdisjoint([*node.input[:2], body.output[0].name]):
        found.loops.add(loop_name(node))
        found.counted |= dict.fromkeys(node.output[len(own) :], f"Loop {loop_name(node)}")
    _carry(found, made, node.output)


def _carry(found: Moving, names: Sequence[str], into: Sequence[str]) -> bool:
    """Hands on to some values what is said of others, in or out of a body; gives whether it is new."""
    known = len(found.counted)
    found.counted |= {to: found.counted[name] for name, to in zip(names, into, strict=False) if name in found.counted}
    return len(found.counted) > known


def _shaped_by(node: Node, found: Moving) -> Sequence[str]:
    """Gives the inputs of a node whose shapes, not values, its outputs take theirs from."""
    if node.op_type in _SHAPED_LIKE_FIRST:
        return list(node.input[:1])
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Reshape":
        shape = found.numbers.get(node.input[1], [None]) if node.input[1:] else given.get("shape", [])
        # an axis that is left over or kept is of as many entries as there are, unless the rows stand before it
        left_over = 0 in shape or (-1 in shape and shape[0] is not None)
        return list(node.input[:left_over])
    whole = not any(node.input[1:]) and not given.get("axes") and not given.get("noop_with_empty_axes")
    return [] if node.op_type.startswith("Reduce") and whole else list(node.input)


def _entries(tensor: Any) -> list[int | None]:
    whole = tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) <= _FEW
    return [int(one) for one in onnx.numpy_helper.to_array(tensor).reshape(-1)] if whole else [None]


def _put_together(node: Node, found: Moving) -> list[int | None]:
    """Gives the entries of the first output of a node."""
    given = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Constant":
        one = given.get("value")
        return _entries(one.t) if one else [*given["value_ints"].ints] if "value_ints" in given else [None]
    if node.op_type == "Concat" or node.op_type in _SAME_NUMBERS:
        parts = node.input if node.op_type == "Concat" else node.input[:1]
        return [entry for name in parts for entry in found.numbers.get(name, [None])]
    return [None]


def _counts(node: Node, found: Moving) -> str:
    """Names a node that makes as many entries as values say; empty where it does not."""
    given = [name for place, name in enumerate(node.input) if place in _SHAPED_BY.get(node.op_type, ())]
    return "" if found.values.isdisjoint(given) else f"{node.op_type} {node.output[0]}"
