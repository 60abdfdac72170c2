"""Whether the random part of an ONNX graph makes one value of several rows: then passes cannot share a batch.

It is ``mixing`` for graphs: told by how values grow from some rows to more, by what operators do, and by what bodies
decide.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from mcdrop.onnx_graph import Graph, Node, bodies, depends_on, following, reads, walk
from mcdrop.onnx_names import Constants, constants, number

__all__ = ["scaled_together", "united"]

Values = Mapping[str, NDArray[Any]]

_SIZES = ("Shape", "Size")
_NOT_UNITING = (*_SIZES, "CastLike")  # which is as large as its first input, and reads no number of its second
_SCALING = "DynamicQuantize"  # how the names of operators begin that scale by the largest of all numbers
_REDUCING = ("Reduce", "ArgMax", "ArgMin")
_DECIDES, _UNITES = "decides by values of all rows", "makes one value of several rows"


def united(model: Any, masks: Iterable[str], few: Values, more: Values) -> str:
    """Says of all values on few rows and on more what keeps passes from sharing a batch; empty where nothing does."""
    random, known = depends_on(model.graph, masks), constants(model)
    for node in model.graph.node:
        if random.isdisjoint(node.output) or node.op_type in _NOT_UNITING:
            continue
        told = [name for name in reads(node) if name in few and name in more]
        grown = any(few[name].shape != more[name].shape for name in told)
        found = _UNITES * (node.op_type.startswith(_SCALING) or (grown and _stays(node, few, more)))
        for _, body in bodies(node):
            found = found or _inside(body, node.op_type == "Loop", random, known)
        if found:
            return f"{node.op_type} {node.output[0]} {found}"
    return ""


def scaled_together(model: Any) -> list[str]:
    """Names the nodes that scale what follows from inputs by the largest of its numbers, those of all rows together."""
    scaling = [place for place in walk(model.graph) if place.node.op_type.startswith(_SCALING)]
    moving = following(model.graph) if scaling else set()
    return [place.path for place in scaling if not moving.isdisjoint(place.node.input)]


def _stays(node: Node, few: Values, more: Values) -> bool:
    """Whether something that a node makes is as large on more rows; of a node with bodies, what it makes first."""
    names = node.output[:1] if any(bodies(node)) else node.output  # a loop may give out the number of its steps too
    made = [(few[name], more[name]) for name in names if name in few and name in more]
    return any(a.shape == b.shape and a.size > 0 for a, b in made)


def _inside(body: Graph, loop: bool, random: set[str], known: Constants) -> str:
    """Says what a body does with values of all rows; a loop's first inputs count its steps.

    Its values are not looked at, as many of them are there in some steps, or on some rows, only.
    """
    following = {*random, *(info.name for info in body.input[2 * loop :])}
    for node in body.node:
        if node.op_type in _SIZES or not reads(node) & following:
            continue
        if node.op_type == "If" and node.input[0] in following:
            return _DECIDES
        if _reduces(node, known):
            return _UNITES
        for _, inner in bodies(node):
            found = _inside(inner, node.op_type == "Loop", following, known)
            if found:
                return found
        following |= set(node.output)
    return _DECIDES if loop and body.output[0].name in following else ""


def _reduces(node: Node, known: Constants) -> bool:
    """Whether an operator may reduce over the rows: over all axes, the first or one that is not known."""
    if not node.op_type.startswith(_REDUCING):
        return bool(node.op_type.startswith(_SCALING))
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    axes: Any = given.get("axes", given.get("axis"))
    if axes is None and len(node.input) > 1:
        axes = number(known, node.input[1])
    return axes is None or np.size(axes) == 0 or any(axis < 1 and axis != -1 for axis in np.ravel(axes))
