"""The draws of an ONNX graph become inputs: each ``Slot`` is an input for masks where a random operator stood.

A graph that is changed so is deterministic: no runtime's seed, thread, provider or optimiser level matters to it. To
teach it a random operator, add one function and one line to ``DRAWS``.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mcdrop.errors import InputError, UncontrolledDraw
from mcdrop.onnx_graph import Place, drop_unread_inputs, opset, read_names, reads, walk
from mcdrop.onnx_names import REAL, constants, distinct_names, number
from mcdrop.onnx_slots import Change, Slot, told, types_of, with_sites

__all__ = ["DRAWS", "drop_rates", "masks_as_inputs"]

_COMPARISONS = {"Greater": False, "GreaterOrEqual": False, "Less": True, "LessOrEqual": True}
_EXPAND = 8  # the opset that brought Expand
_TRUTHS = 10  # the opset from which on the second output of Dropout holds truths, and no numbers


def drop_rates(inject: Mapping[str, float] | None) -> dict[str, float]:
    """Gives drop rates by the names of nodes as plain numbers: 0.3 for a 0.3 in float32.

    Raises:
        InputError: a rate is no number between 0 and 1, or none has a name.
    """
    if inject is not None and not isinstance(inject, Mapping):
        raise InputError(f"inject wants drop rates by the names of nodes, as in {{'node': 0.1}}, got {inject!r}")
    for path, p in (inject or {}).items():
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 < p < 1:
            raise InputError(f"inject wants a drop rate between 0 and 1 for {path!r}, got {p!r}")
    return {path: float(str(p) if isinstance(p, np.floating) else p) for path, p in (inject or {}).items()}


def masks_as_inputs(model: "onnx.ModelProto", inject: Mapping[str, float] | None = None) -> tuple[Slot, ...]:
    """Changes a model in place: every random operator becomes an input for its masks; gives the slots in order.

    Args:
        model: what ``read_graph`` gave.
        inject: drop rates by the name of the node after whose first output a dropout is put.

    Raises:
        UncontrolledDraw: a random operator, or a rate, that masks cannot stand for.
        ModelRefused: a value has a name that is kept for masks.
        ArtifactError: a constant that is a rate is damaged.
        InputError: ``inject`` names a node that is not there, one that draws itself, or one of whole numbers.
    """
    inject = drop_rates(inject)
    distinct_names(model)
    read = read_names(model)
    types = types_of(model)
    if not told(model):  # whose uniform numbers are just that, whatever they are compared with
        _named_casts(model, types)
    change = Change(model, constants(model), types, [])
    for place in [*walk(model.graph)]:
        if place.operator in DRAWS:
            DRAWS[place.operator](change, place)
        if place.path in inject:
            if place.node not in list(place.graph.node):  # masks stand for it by now
                raise InputError(
                    f"inject cannot put a dropout after {place.path!r}, which draws itself; name a node that takes "
                    "what it makes"
                )
            _inject(change, place, inject.pop(place.path))
    if inject:
        names = ", ".join(place.path for place in walk(model.graph) if place.operator in ("Gemm", "MatMul", "Softmax"))
        raise InputError(f"inject names no node of the graph: {', '.join(map(repr, inject))}; it has {names[:500]}")
    drop_unread_inputs(model, read)  # such as a training flag
    return with_sites(model, tuple(change.slots))


def _named_casts(model: "onnx.ModelProto", types: Mapping[str, int]) -> None:
    """Gives casts to the type of another real value that type by name: such a value may be a draw, or a constant."""
    for place in [*walk(model.graph)]:
        node = place.node
        if place.operator == "CastLike" and types.get(node.input[1]) in REAL:
            cast = helper.make_node("Cast", node.input[:1], node.output, node.name, to=types[node.input[1]])
            node.CopyFrom(cast)


def _replace(place: Place, new: list[Any], *, after: bool = False) -> None:
    at = list(place.graph.node).index(place.node)
    if not after:
        del place.graph.node[at]
    for offset, node in enumerate(new):
        place.graph.node.insert(at + after + offset, node)


def _consumers(place: Place, value: str) -> list[Any]:
    """The nodes beside a node that read a value, in their bodies too."""
    return [node for node in place.graph.node if value in reads(node)]


def _given(place: Place, value: str) -> bool:
    """Whether the graph of a node gives a value to the outside."""
    return any(output.name == value for output in place.graph.output)


def _shortest(value: Any) -> float:
    """The decimal number that was meant by a number in its own type: 0.3, not 0.30004883 or 0.30000001192."""
    return float(str(np.float32(str(value))))


def _drop_facts(p: float) -> dict[str, Any]:
    return {"kind": "bernoulli", "p": p, "scale": 1 / (1 - p) if p < 1 else 0.0, "shift": 0.0, "expected": 1.0}


# -- operators ---------------------------------------------------------------------------------------------------------


def _dropout(change: Change, place: Place) -> None:
    node = place.node
    ratio: Any = next((attribute.f for attribute in node.attribute if attribute.name == "ratio"), 0.5)
    if len(node.input) > 1 and node.input[1]:
        rate = number(change.known, node.input[1], computed=True)
        if rate is None:
            raise UncontrolledDraw(
                f"the rate of {place.path} is only known while the graph runs; make it a constant, as by "
                "onnxscript.optimizer.optimize"
            )
        if rate.size != 1 or rate.dtype.kind not in "fiu":
            raise UncontrolledDraw(f"the rate of {place.path} must be one number, got {rate.size} of {rate.dtype}")
        ratio = rate.reshape(())[()]
    if not 0 <= ratio <= 1:
        raise UncontrolledDraw(f"the rate of {place.path} must be between 0 and 1, got {ratio:g}")
    new: list[Any] = []
    x = node.input[0]
    mask = change.add(place, new, at=x, **_drop_facts(_shortest(ratio)))
    new.append(helper.make_node("Mul", [x, change.typed(mask, x, new)], [node.output[0]], name=place.path))
    kept = next((name for name in node.output[1:] if _consumers(place, name) or _given(place, name)), "")
    if kept:  # which units are, in the whole shape
        whole = _expanded(change, mask, x, new)
        numbers = opset(change.model) < _TRUTHS
        truths = f"{mask}.truths" if numbers else kept
        new.append(helper.make_node("Cast", [whole], [truths], to=TensorProto.BOOL))
        new.extend([change.cast(truths, x, kept)] * numbers)
    _replace(place, new)


def _inject(change: Change, place: Place, p: float) -> None:
    new: list[Any] = []
    value = place.node.output[0]
    kind = change.types.get(value, 0)
    if kind and kind not in REAL:  # 1 / (1 - p) is none of its numbers
        raise InputError(
            f"inject cannot put a dropout after {place.path!r}, whose numbers are {TensorProto.DataType.Name(kind)}: "
            "what it keeps is scaled; name a node that makes real numbers, such as a Cast to FLOAT after it"
        )
    raw = f"{change.next_mask}.undropped"
    change.types[raw] = kind
    mask = change.add(place, new, at=raw, **_drop_facts(p))
    place.node.output[0] = raw  # not before: a node without a name has its path from it
    new.append(helper.make_node("Mul", [raw, change.typed(mask, raw, new)], [value]))
    _replace(place, new, after=True)


def _expanded(change: Change, mask: str, like: str, new: list[Any]) -> str:
    change.needs(_EXPAND, change.slots[-1].path)
    shape, whole = f"{mask}.of{len(new)}", f"{mask}.whole{len(new)}"
    new.append(helper.make_node("Shape", [like], [shape]))
    new.append(helper.make_node("Expand", [mask, shape], [whole]))
    return whole


def _numbers(kind: str) -> Callable[[Change, Place], None]:
    """RandomUniform, RandomNormal and the same ``Like`` another value."""

    def rule(change: Change, place: Place) -> None:
        node, new = place.node, list[Any]()
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        like = node.input[0] if node.input else f"{change.next_mask}.like"
        if not node.input:
            shape = helper.make_tensor(f"{like}.shape", TensorProto.INT64, [len(given["shape"])], given["shape"])
            new.append(helper.make_node("Constant", [], [f"{like}.shape"], value=shape))
            new.append(helper.make_node("ConstantOfShape", [f"{like}.shape"], [like]))
        if kind == "uniform" and not told(change.model) and _coin(change, place, like, new):
            return
        low, high = float(given.get("low", 0.0)), float(given.get("high", 1.0))
        scale, shift = (high - low, low) if kind == "uniform" else (given.get("scale", 1.0), given.get("mean", 0.0))
        facts = {"scale": float(scale), "shift": float(shift), "p": 0.0}
        expected = (low + high) / 2 if kind == "uniform" else float(shift)
        mask = change.add(place, new, at=like, kind=kind, expected=expected, **facts)
        whole = _expanded(change, mask, like, new)
        wanted = given.get("dtype") or (0 if node.input else TensorProto.FLOAT)
        new.append(change.cast(whole, like, node.output[0], wanted))
        _replace(place, new)

    return rule


def _coin(change: Change, place: Place, like: str, new: list[Any]) -> bool:
    """A uniform number that is only compared with a constant is a coin, as in exports of channel dropout."""
    users = _consumers(place, place.node.output[0])
    if len(users) != 1 or users[0].op_type not in _COMPARISONS or _given(place, place.node.output[0]):
        return False
    user = users[0]
    first = user.input[0] == place.node.output[0]
    level = number(change.known, user.input[1] if first else user.input[0])
    share = None if level is None else _share(place.node, level)
    if share is None:
        return False
    below = _COMPARISONS[user.op_type] == first
    chance = share if below else _shortest(1 - share)
    reals, between = _as_numbers(place, user.output[0])
    facts: dict[str, Any] = {
        "kind": "bernoulli",
        "p": _shortest(1 - chance),
        "scale": 1.0,
        "shift": 0.0,
        "expected": chance if reals else float(chance >= 0.5),  # a truth cannot be in between, so it is the likely one
        "channels": True,
    }
    mask = change.add(place, new, at=like, **facts)
    whole = _expanded(change, mask, like, new)
    if reals:  # straight to numbers, so that the expectation need not be a truth
        for node in reals:
            node.input[0] = whole
        for node in between:
            place.graph.node.remove(node)
    else:
        new.append(helper.make_node("Cast", [whole], [user.output[0]], to=TensorProto.BOOL))
    place.graph.node.remove(user)
    _replace(place, new)
    return True


def _share(node: Any, level: Any) -> float | None:
    """The share of a node's uniform numbers that lies below a level; None where that is no single number."""
    given = {attribute.name: attribute.f for attribute in node.attribute}
    low, high = given.get("low", 0.0), given.get("high", 1.0)
    if level.size != 1 or level.ndim > 1 or not low < high or math.isnan(level.item()):
        return None
    return _shortest(min(max((_shortest(level.reshape(())[()]) - low) / (high - low), 0.0), 1.0))


def _as_numbers(place: Place, value: str) -> tuple[list[Any], list[Any]]:
    """The casts to real numbers that a truth goes into, and the casts in between; none where it goes anywhere else."""
    reals, between = list[Any](), list[Any]()
    left = [value]
    while left:
        name = left.pop()
        users = _consumers(place, name)
        if not users or _given(place, name) or any(node.op_type != "Cast" for node in users):
            return [], []
        for node in users:
            real = helper.get_node_attr_value(node, "to") in REAL
            (reals if real else between).append(node)
            left.extend([] if real else node.output)
    return reals, between


def _bernoulli(change: Change, place: Place) -> None:
    """Each unit is 1 with the probability that the input holds for it."""
    node, new = place.node, list[Any]()
    chance = node.input[0]
    mask = change.add(place, new, at=chance, kind="uniform", p=0.0, scale=1.0, shift=0.0, expected=0.5)
    hit = f"{mask}.hit"
    new.append(helper.make_node("Less", [change.typed(mask, chance, new), chance], [hit]))
    wanted = next((attribute.i for attribute in node.attribute if attribute.name == "dtype"), 0)
    new.append(change.cast(hit, chance, node.output[0], wanted))
    _replace(place, new)


def _refuse(change: Change, place: Place) -> None:
    raise UncontrolledDraw(f"{place.path} ({place.operator}) draws random numbers that no mask can stand for")


DRAWS: dict[str, Callable[[Change, Place], None]] = {
    "Bernoulli": _bernoulli,
    "Dropout": _dropout,
    "Multinomial": _refuse,
    "RandomNormal": _numbers("normal"),
    "RandomNormalLike": _numbers("normal"),
    "RandomUniform": _numbers("uniform"),
    "RandomUniformLike": _numbers("uniform"),
    "com.microsoft:BiasDropout": _refuse,
    "com.microsoft:BitmaskBiasDropout": _refuse,
    "com.microsoft:BitmaskDropout": _refuse,
    "com.microsoft:DropoutGrad": _refuse,
    "com.microsoft:Sampling": _refuse,
}
