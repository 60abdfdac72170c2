"""The draws of an ONNX graph become inputs: each ``Slot`` is an input for masks where a random operator stood.

A graph that is changed so is deterministic: no runtime's seed, thread, provider or optimiser level matters to it. To
teach it a random operator, add one function and one line to ``DRAWS``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from mcdrop.errors import InputError, UncontrolledDraw
from mcdrop.onnx_bodies import LOOPS, into_loop, shape_outside
from mcdrop.onnx_graph import Constants, Place, constant, opset, reads, walk

__all__ = ["DRAWS", "SITES", "Slot", "masks_as_inputs"]

SITES = "mcdrop.sites"  # metadata of a graph: number and module of each of its draws, in order

_COMPARISONS = {"Greater": False, "GreaterOrEqual": False, "Less": True, "LessOrEqual": True}


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
class _Change:
    """A graph under change: what is known of it and what was found so far."""

    model: Any
    known: Constants
    types: dict[str, int]
    slots: list[Slot]

    def add(self, place: Place, new: list[Any], *, at: str = "", **facts: Any) -> str:
        """Notes a slot; gives the value that holds its mask in the node's graph, made by nodes put into ``new``."""
        name = f"mcdrop.mask{len(self.slots)}"
        if sum(node.op_type in LOOPS for _, node, _ in place.chain) > 1:
            raise UncontrolledDraw(f"{place.path} draws in a loop inside a loop, where its masks cannot be numbered")
        self.model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        mask, loop = into_loop(place.chain, name, new)
        shape = shape_outside(place.chain, at, name, new) if place.chain else ""
        self.slots.append(Slot(name, place.path, like=at, shape=shape, loop=loop, **facts))
        return mask

    def typed(self, mask: str, like: str, new: list[Any]) -> str:
        """The mask in the type of another value."""
        kind = self.types.get(like, 0)
        if kind == TensorProto.FLOAT:
            return mask
        cast = f"{mask}.typed{len(new)}.{len(self.slots)}"
        if kind:
            new.append(helper.make_node("Cast", [mask], [cast], to=kind))
        elif opset(self.model) >= 15:
            new.append(helper.make_node("CastLike", [mask, like], [cast]))
        else:
            return mask
        return cast


def masks_as_inputs(model: "onnx.ModelProto", inject: Mapping[str, float] | None = None) -> tuple[Slot, ...]:
    """Changes a model in place: every random operator becomes an input for its masks; gives the slots in order.

    Args:
        model: what ``read_graph`` gave.
        inject: drop rates by the name of the node after whose first output a dropout is put.

    Raises:
        UncontrolledDraw: a random operator, or a rate, that masks cannot stand for.
        InputError: ``inject`` names a node that is not there.
    """
    inject = dict(inject or {})
    try:
        inferred = shape_inference.infer_shapes(model).graph
    except Exception:  # of operators that it does not know; types are then asked of the graph itself
        inferred = model.graph
    infos = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    change = _Change(model, constant(model), types, [])
    for place in [*walk(model.graph)]:
        if place.operator in DRAWS:
            DRAWS[place.operator](change, place)
        if place.path in inject:
            _inject(change, place, inject.pop(place.path))
    if inject:
        names = ", ".join(place.path for place in walk(model.graph) if place.operator in ("Gemm", "MatMul", "Softmax"))
        raise InputError(f"inject names no node of the graph: {', '.join(map(repr, inject))}; it has {names[:500]}")
    _drop_unused_inputs(model)
    return _with_sites(model, tuple(change.slots))


def _told(model: Any) -> str:
    """What a graph says of its own draws, empty where it says nothing; its uniform numbers are then just that."""
    return next((str(entry.value) for entry in model.metadata_props if entry.key == SITES), "")


def _with_sites(model: Any, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """Numbers and names the draws as the network did that the graph was made from, where it says so."""
    try:
        sites = [(int(number), str(path)) for number, path in json.loads(_told(model) or "[]")]
    except (ValueError, TypeError):
        return slots
    if len(sites) != len(slots) or len({number for number, _ in sites}) != len(sites):
        return slots
    return tuple(replace(slot, path=path, site=number) for slot, (number, path) in zip(slots, sites, strict=True))


def _replace(place: Place, new: list[Any], *, after: bool = False) -> None:
    at = list(place.graph.node).index(place.node)
    if not after:
        del place.graph.node[at]
    for offset, node in enumerate(new):
        place.graph.node.insert(at + after + offset, node)


def _consumers(place: Place, value: str) -> list[Any]:
    return [node for node in place.graph.node if value in node.input]


def _shortest(value: Any) -> float:
    """The decimal number that was meant by a number in float32: 0.3, not 0.30000001192."""
    return float(str(np.float32(value)))


def _drop_facts(p: float) -> dict[str, Any]:
    return {"kind": "bernoulli", "p": p, "scale": 1 / (1 - p) if p < 1 else 0.0, "shift": 0.0, "expected": 1.0}


# -- operators ---------------------------------------------------------------------------------------------------------


def _dropout(change: _Change, place: Place) -> None:
    node = place.node
    ratio = next((attribute.f for attribute in node.attribute if attribute.name == "ratio"), 0.5)
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in change.known:
            raise UncontrolledDraw(f"the rate of {place.path} is only known while the graph runs; make it a constant")
        ratio = change.known[node.input[1]].item()
    new: list[Any] = []
    x = node.input[0]
    mask = change.add(place, new, at=x, **_drop_facts(_shortest(ratio)))
    new.append(helper.make_node("Mul", [x, change.typed(mask, x, new)], [node.output[0]], name=place.path))
    if len(node.output) > 1 and node.output[1]:  # which units are kept, as booleans of the whole shape
        whole = _expanded(mask, x, new)
        new.append(helper.make_node("Cast", [whole], [node.output[1]], to=TensorProto.BOOL))
    _replace(place, new)


def _inject(change: _Change, place: Place, p: float) -> None:
    if not 0 < p < 1:
        raise InputError(f"inject wants a drop rate between 0 and 1 for {place.path!r}, got {p!r}")
    new: list[Any] = []
    value = place.node.output[0]
    raw = f"{value}.undropped"
    place.node.output[0] = raw
    if value in change.types:
        change.types[raw] = change.types[value]
    mask = change.add(place, new, at=raw, **_drop_facts(p))
    new.append(helper.make_node("Mul", [raw, change.typed(mask, raw, new)], [value]))
    _replace(place, new, after=True)


def _expanded(mask: str, like: str, new: list[Any]) -> str:
    shape, whole = f"{mask}.of{len(new)}", f"{mask}.whole{len(new)}"
    new.append(helper.make_node("Shape", [like], [shape]))
    new.append(helper.make_node("Expand", [mask, shape], [whole]))
    return whole


def _numbers(kind: str) -> Callable[[_Change, Place], None]:
    """RandomUniform, RandomNormal and the same ``Like`` another value."""

    def rule(change: _Change, place: Place) -> None:
        node, new = place.node, list[Any]()
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        like = node.input[0] if node.input else f"{node.output[0]}.like"
        if not node.input:
            shape = helper.make_tensor(f"{like}.shape", TensorProto.INT64, [len(given["shape"])], given["shape"])
            new.append(helper.make_node("Constant", [], [f"{like}.shape"], value=shape))
            new.append(helper.make_node("ConstantOfShape", [f"{like}.shape"], [like]))
        if kind == "uniform" and not _told(change.model) and _coin(change, place, like, new):
            return
        low, high = float(given.get("low", 0.0)), float(given.get("high", 1.0))
        scale, shift = (high - low, low) if kind == "uniform" else (given.get("scale", 1.0), given.get("mean", 0.0))
        facts = {"scale": float(scale), "shift": float(shift), "p": 0.0}
        expected = (low + high) / 2 if kind == "uniform" else float(shift)
        mask = change.add(place, new, at=like, kind=kind, expected=expected, **facts)
        whole = _expanded(mask, like, new)
        wanted = given.get("dtype") or (change.types.get(like, TensorProto.FLOAT) if node.input else TensorProto.FLOAT)
        new.append(helper.make_node("Cast", [whole], [node.output[0]], to=wanted))
        _replace(place, new)

    return rule


def _coin(change: _Change, place: Place, like: str, new: list[Any]) -> bool:
    """A uniform number that is only compared with a constant is a coin, as in exports of channel dropout."""
    users = _consumers(place, place.node.output[0])
    if len(users) != 1 or users[0].op_type not in _COMPARISONS:
        return False
    user = users[0]
    first = user.input[0] == place.node.output[0]
    level = change.known.get(user.input[1] if first else user.input[0])
    if level is None or level.size != 1:
        return False
    below = _COMPARISONS[user.op_type] == first
    chance = _shortest(level.item()) if below else _shortest(1 - _shortest(level.item()))
    facts: dict[str, Any] = {
        "kind": "bernoulli",
        "p": _shortest(1 - chance),
        "scale": 1.0,
        "shift": 0.0,
        "expected": chance,
        "channels": True,
    }
    mask = change.add(place, new, at=like, **facts)
    whole = _expanded(mask, like, new)
    casts = _consumers(place, user.output[0])
    outputs = {output.name for output in place.graph.output}
    if user.output[0] in outputs or any(node.op_type != "Cast" for node in casts):
        new.append(helper.make_node("Cast", [whole], [user.output[0]], to=TensorProto.BOOL))
        place.graph.node.remove(user)
    else:  # straight to numbers, so that the expectation need not be a boolean
        for node in casts:
            node.input[0] = whole
        place.graph.node.remove(user)
    _replace(place, new)
    return True


def _bernoulli(change: _Change, place: Place) -> None:
    """Each unit is 1 with the probability that the input holds for it."""
    node, new = place.node, list[Any]()
    chance = node.input[0]
    mask = change.add(place, new, at=chance, kind="uniform", p=0.0, scale=1.0, shift=0.0, expected=0.5)
    hit = f"{mask}.hit"
    new.append(helper.make_node("Less", [change.typed(mask, chance, new), chance], [hit]))
    wanted = next((attribute.i for attribute in node.attribute if attribute.name == "dtype"), 0)
    wanted = wanted or change.types.get(chance, TensorProto.FLOAT)
    new.append(helper.make_node("Cast", [hit], [node.output[0]], to=wanted))
    _replace(place, new)


def _refuse(change: _Change, place: Place) -> None:
    raise UncontrolledDraw(f"{place.path} ({place.operator}) draws random numbers that no mask can stand for")


def _drop_unused_inputs(model: Any) -> None:
    """Takes away inputs that nothing reads any more, such as a training flag."""
    used = {name for node in model.graph.node for name in reads(node)} | {out.name for out in model.graph.output}
    kept = [info for info in model.graph.input if info.name in used]
    del model.graph.input[:]
    model.graph.input.extend(kept)


DRAWS: dict[str, Callable[[_Change, Place], None]] = {
    "Bernoulli": _bernoulli,
    "Dropout": _dropout,
    "Multinomial": _refuse,
    "RandomNormal": _numbers("normal"),
    "RandomNormalLike": _numbers("normal"),
    "RandomUniform": _numbers("uniform"),
    "RandomUniformLike": _numbers("uniform"),
    "com.microsoft:BiasDropout": _refuse,
    "com.microsoft:BitmaskDropout": _refuse,
    "com.microsoft:DropoutGrad": _refuse,
}
