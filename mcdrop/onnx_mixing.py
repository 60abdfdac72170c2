"""Whether the random part of an ONNX graph makes one value of several rows: then passes cannot share a batch.

It is ``mixing`` for graphs: told by how values grow from some rows to more, and by what bodies decide.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from mcdrop.onnx_graph import Graph, Node, bodies, depends_on, reads

__all__ = ["united"]

Values = Mapping[str, NDArray[Any]]

_SIZES = ("Shape", "Size")


def united(graph: Graph, masks: Iterable[str], few: Values, more: Values) -> str:
    """Says of all values on few rows and on more what keeps passes from sharing a batch; empty where nothing does."""
    random = depends_on(graph, masks)
    for node in graph.node:
        if random.isdisjoint(node.output) or node.op_type in _SIZES:
            continue
        told = [name for name in reads(node) if name in few and name in more]
        if any(few[name].shape != more[name].shape for name in told) and _stays(node, few, more):
            return f"{node.op_type} {node.output[0]} makes one value of several rows"
        if any(_decides(body, node.op_type == "Loop", random) for _, body in bodies(node)):
            return f"{node.op_type} {node.output[0]} decides by values of all rows"
    return ""


def _stays(node: Node, few: Values, more: Values) -> bool:
    """Whether what a node makes first is as large on more rows."""
    a, b = few.get(node.output[0]), more.get(node.output[0])
    return a is not None and b is not None and a.shape == b.shape and a.size > 0


def _decides(body: Graph, loop: bool, random: set[str]) -> bool:
    """Whether a branch in a body, or the end of a loop, follows from values; a loop's first inputs count its steps."""
    following = {*random, *(info.name for info in body.input[2 * loop :])}
    for node in body.node:
        if node.op_type == "If" and node.input[0] in following:
            return True
        if any(_decides(inner, node.op_type == "Loop", following) for _, inner in bodies(node)):
            return True
        if node.op_type not in _SIZES and reads(node) & following:
            following |= set(node.output)
    return loop and body.output[0].name in following
