"""The draws of an ONNX graph that is changed: a ``Slot`` for each, and what the graph says of them itself."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from mcdrop.errors import UncontrolledDraw
from mcdrop.onnx_bodies import LOOPS, into_branch, into_loop, shape_outside
from mcdrop.onnx_graph import Place, every_graph, opset, walk
from mcdrop.onnx_names import MASK, REAL, Constants

__all__ = ["SITES", "Change", "Slot", "told", "types_of", "with_sites"]

SITES = "mcdrop.sites"  # metadata of a graph: number and module of each of its draws, in order

_SPREAD = 7  # the opset from which on what is multiplied may be of several shapes
_SIGN, _RANGE = 9, 11  # the opsets that brought these operators
_CAST_LIKE = 15  # from here on a value can be given the type of another that is not known


@dataclass(frozen=True)
class Slot:
    """A draw of a graph and the input that stands for it.

    The input takes ``numbers * scale + shift`` in any shape that broadcasts to that of the draw; ``expected`` switches
    the draw off. ``like`` is a value that has the draw's shape; for a draw inside a body ``shape`` is a value that
    holds it. A slot with a ``loop`` (the node that repeats it) takes one mask a step, stacked on the first axis.
    ``channels`` says that axes of size 1 at the end are only there to meet the units of a channel. ``site`` is
    the number of the draw where the graph itself tells it.
    """

    mask: str
    path: str
    kind: str
    p: float
    scale: float
    shift: float
    expected: float
    like: str = ""
    shape: str = ""
    loop: str = ""
    channels: bool = False
    site: int | None = None

    def values(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gives what is fed for the numbers that ``masks`` gave."""
        fed = numbers * np.float32(self.scale)
        return fed if self.shift == 0 else fed + np.float32(self.shift)


@dataclass
class Change:
    """A graph under change: what is known of it and what was found so far."""

    model: Any
    known: Constants
    types: dict[str, int]
    slots: list[Slot]

    @property
    def next_mask(self) -> str:
        """The name of the next mask; no name of a graph begins with it (see ``distinct_names``)."""
        return f"{MASK}{len(self.slots)}"

    def add(self, place: Place, new: list[Any], *, at: str = "", **facts: Any) -> str:
        """Notes a slot; gives the value that holds its mask in the node's graph, made by nodes put into ``new``."""
        self.needs(_SPREAD, place.path)
        name = self.next_mask
        around = [node.op_type for _, node, _ in place.chain]
        strange = [operator for operator in around if operator not in ("If", *LOOPS)]
        if strange:
            raise UncontrolledDraw(
                f"{place.path} draws in the body of a {strange[0]}, where its masks cannot be numbered"
            )
        if sum(operator in LOOPS for operator in around) > 1:
            raise UncontrolledDraw(f"{place.path} draws in a loop inside a loop, where its masks cannot be numbered")
        if not {*around}.isdisjoint(LOOPS):
            self.needs(_RANGE if "Scan" in around else _SIGN, place.path)
        self.model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        mask, loop = into_loop(place.chain, name, new)
        mask = into_branch(mask, new) if "If" in around else mask
        shape = shape_outside(place.chain, at, name, new) if place.chain else ""
        self.slots.append(Slot(name, place.path, like=at, shape=shape, loop=loop, **facts))
        return mask

    def needs(self, version: int, path: str) -> None:
        """Refuses a draw whose masks need newer operators than the graph has."""
        if opset(self.model) < version:
            raise UncontrolledDraw(
                f"{path} draws in a graph of opset {opset(self.model)}, whose operators are too old for its masks; "
                f"bring the graph up to opset {version} or later with onnx.version_converter"
            )

    def typed(self, mask: str, like: str, new: list[Any]) -> str:
        """The mask in the type of another value."""
        if self.types.get(like, 0) == TensorProto.FLOAT:
            return mask
        new.append(self.cast(mask, like, f"{mask}.typed{len(new)}.{len(self.slots)}"))
        return str(new[-1].output[0])

    def cast(self, value: str, like: str, output: str, to: int = 0) -> Any:
        """The node that gives a value in a type, or else in that of another value."""
        to = to or self.types.get(like, 0)
        if not to and opset(self.model) >= _CAST_LIKE:
            return helper.make_node("CastLike", [value, like], [output])
        return helper.make_node("Cast", [value], [output], to=to or TensorProto.FLOAT)


def types_of(model: Any) -> dict[str, int]:
    """Gives the types of values, 0 or nothing where they are not known, as of operators that are not standard ones.

    Where no CastLike can ask for those, they are taken to make real numbers of the type that they take.
    """
    try:
        inferred = shape_inference.infer_shapes(model).graph
    except Exception:  # of operators that it does not know; types are then asked of the graph itself
        inferred = model.graph
    types = dict[str, int]()
    for graph in every_graph(inferred):
        infos = (*graph.value_info, *graph.input, *graph.output)
        types |= {info.name: info.type.tensor_type.elem_type for info in infos}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in (place.node for place in walk(model.graph) if opset(model) < _CAST_LIKE):
        taken = next((types[name] for name in node.input if types.get(name) in REAL), 0)
        types |= {name: types.get(name) or taken for name in node.output}
    return types


def told(model: Any) -> str:
    """What a graph says of its own draws, empty where it says nothing; its uniform numbers are then just that."""
    return next((str(entry.value) for entry in model.metadata_props if entry.key == SITES), "")


def with_sites(model: Any, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """Numbers and names the draws as the network did that the graph was made from, where it says so."""
    try:
        sites = [(int(number), str(path)) for number, path in json.loads(told(model) or "[]")]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return slots
    if len(sites) != len(slots) or len({number for number, _ in sites}) != len(sites):
        return slots
    return tuple(replace(slot, path=path, site=number) for slot, (number, path) in zip(slots, sites, strict=True))
