"""An ONNX graph as data: walked over, changed, cut in two where the first mask enters.

Nothing here draws, and nothing here knows onnxruntime.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx

__all__ = [
    "Chain",
    "Graph",
    "Node",
    "Place",
    "bodies",
    "depends_on",
    "drop_norm_training",
    "drop_own_inputs",
    "drop_unread_inputs",
    "every_graph",
    "following",
    "opset",
    "pruned",
    "read_names",
    "reads",
    "split",
    "walk",
]

_STANDARD = ("", "ai.onnx")
_NORM_HAS_MODE = 14  # from here on an attribute says whether a BatchNormalization trains, before its outputs do
_OWN_CONSTANTS = 4  # from this version of the format on an initializer need not be an input

Node = Any  # protobuf messages carry no types
Graph = Any
Chain = tuple[tuple[Graph, Node, str], ...]


@dataclass(frozen=True)
class Place:
    """A node, the graph that holds it, and the (graph, node, attribute) of each level above, outermost first."""

    graph: Graph
    node: Node
    chain: Chain = ()

    @property
    def operator(self) -> str:
        """The operator, with its domain where that is not the standard one."""
        return self.node.op_type if self.node.domain in _STANDARD else f"{self.node.domain}:{self.node.op_type}"

    @property
    def path(self) -> str:
        """The node's name, or what it is and makes."""
        return self.node.name or f"{self.node.op_type}:{next(iter(self.node.output), '')}"


# -- looking ---------------------------------------------------------------------------------------------------------


def opset(model: Any) -> int:
    """The version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 1)


def walk(graph: Graph, chain: Chain = ()) -> Iterator[Place]:
    """Walks over every node, those of the bodies of If, Loop and Scan after the node that holds them."""
    for node in graph.node:
        yield Place(graph, node, chain)
        for name, body in bodies(node):
            yield from walk(body, (*chain, (graph, node, name)))


def bodies(node: Node) -> Iterator[tuple[str, Graph]]:
    """Walks over (attribute, graph) of the bodies that a node holds itself."""
    for attribute in node.attribute:
        yield from ((attribute.name, body) for body in [attribute.g] * attribute.HasField("g") + list(attribute.graphs))


def every_graph(graph: Graph) -> Iterator[Graph]:
    """Walks over a graph and the bodies in it."""
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from every_graph(body)


def drop_own_inputs(model: Any) -> None:
    """Takes away inputs that have a value in the graph itself, as every weight had in old versions of the format."""
    graph = model.graph
    own = {tensor.name for tensor in graph.initializer} | {one.values.name for one in graph.sparse_initializer}
    kept = [info for info in graph.input if info.name not in own]
    del graph.input[:]
    graph.input.extend(kept)
    model.ir_version = max(model.ir_version, _OWN_CONSTANTS)


def read_names(model: Any) -> set[str]:
    """The values of a model's graph that something reads, its outputs included."""
    return {name for node in model.graph.node for name in reads(node)} | {out.name for out in model.graph.output}


def drop_unread_inputs(model: Any, names: Collection[str] | None = None) -> None:
    """Takes away inputs that nothing reads: those of some names and those that hold no rows, or (None) all."""
    read = read_names(model)
    if names is not None:
        read |= {one.name for one in model.graph.input if one.name not in names and one.type.tensor_type.shape.dim}
    kept = [info for info in model.graph.input if info.name in read]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def drop_norm_training(model: Any) -> list[str]:
    """Sets every BatchNormalization back to its running statistics; gives the paths of those that were not."""
    changed, told = [], opset(model) >= _NORM_HAS_MODE
    for place in walk(model.graph):
        if place.operator != "BatchNormalization":
            continue
        modes = [attribute for attribute in place.node.attribute if attribute.name == "training_mode" and attribute.i]
        if not (modes if told else any(place.node.output[1:])):
            continue
        for attribute in modes:
            attribute.i = 0
        gone = set(place.node.output[1:])
        del place.node.output[1:]
        kept = [output for output in place.graph.output if output.name not in gone]
        del place.graph.output[:]
        place.graph.output.extend(kept)
        changed.append(place.path)
    return changed


# -- cutting -----------------------------------------------------------------------------------------------------------


def reads(node: Node) -> set[str]:
    """The values that a node reads, those that its bodies take from outside included."""
    names = set(node.input)
    for _, body in bodies(node):
        names |= {name for inner in body.node for name in reads(inner)}
        names |= {output.name for output in body.output}
    return names - {""}


def depends_on(graph: Graph, sources: Iterable[str]) -> set[str]:
    """The values that follow from the sources, the sources included."""
    found = set(sources)
    for node in graph.node:  # in topological order, as ONNX demands
        if reads(node) & found:
            found |= set(node.output) - {""}
    return found


def following(graph: Graph, outer: Collection[str] = ()) -> set[str]:
    """The values, those of bodies included, that follow from the inputs of a graph or from some around it."""
    own = {info.name for info in graph.input} - {tensor.name for tensor in graph.initializer}
    found = depends_on(graph, {*outer, *own})
    for node in graph.node:
        for _, body in bodies(node):
            found |= following(body, found)
    return found


def pruned(model: Any, outputs: list[str], inputs: "list[onnx.ValueInfoProto] | None" = None) -> "onnx.ModelProto":
    """Gives the part of a model that makes some values; ``inputs`` are values that it is given instead of making."""
    graph, cut = model.graph, {info.name for info in inputs or ()}
    wanted, kept = set(outputs) - cut, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= reads(node) - cut
    part = onnx.ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(model.opset_import)
    part.graph.name = graph.name or "mcdrop"
    part.graph.node.extend(reversed(kept))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in wanted)
    part.graph.sparse_initializer.extend(one for one in graph.sparse_initializer if one.values.name in wanted)
    part.graph.input.extend([info for info in graph.input if info.name in wanted] if inputs is None else inputs)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return part


def split(model: Any, masks: Iterable[str]) -> tuple[list[str], set[str]]:
    """Gives the values that the random part takes from the part before the first mask, and all that are random.

    What follows from no input at all is made anew in both parts and is not listed.
    """
    graph = model.graph
    random = depends_on(graph, masks)
    initial = {tensor.name for tensor in graph.initializer}
    moving = depends_on(graph, {info.name for info in graph.input} - initial)
    border: dict[str, None] = {}
    for node in graph.node:
        if random & set(node.output):
            border.update(dict.fromkeys(sorted((reads(node) & moving) - random)))
    inner = {name for place in walk(graph) if place.chain for name in place.node.output}
    return [name for name in border if name not in inner], random
