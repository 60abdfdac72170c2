"""A graph with draws becomes one plain graph that runs all passes by itself: masks are constants, rows stay free.

What comes before the first mask runs once. What follows runs on the rows repeated for the passes; where rows cannot be
repeated it is written out pass by pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from mcdrop.errors import ModelRefused
from mcdrop.onnx_bodies import of_steps
from mcdrop.onnx_graph import depends_on, opset, pruned
from mcdrop.onnx_slots import Slot
from mcdrop.onnx_trace import Axis, Trace

__all__ = ["Builder", "all_passes"]

OPSET = 20
PREFIX = "network."
LABEL = "label"  # the only output of whole numbers
_OLDEST = 18  # from here on the operators below have the form that they are written in
_IR = 10

Array = NDArray[Any]


class Builder:
    """Nodes and constants that are added to a graph, each under a name of its own."""

    def __init__(self, model: Any) -> None:
        """Takes the model that grows; its numbers are of float32 until ``dtype`` says otherwise."""
        self.model, self.dtype = model, np.dtype(np.float32)
        self._count = 0

    def fresh(self) -> str:
        """Gives a name that no other value has."""
        self._count += 1
        return f"mcdrop.{self._count}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Gives the name of a constant; None is the type of the graph's numbers."""
        name = self.fresh()
        array = np.ascontiguousarray(np.asarray(value, dtype or self.dtype)).reshape(np.shape(value))
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def whole(self, *numbers: int) -> str:
        """Gives the name of a list of whole numbers, as shapes and axes are."""
        return self.constant(list(numbers), np.int64)

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Gives the name of what a new node makes."""
        output = output or self.fresh()
        self.model.graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def real(self, value: str) -> str:
        """Gives a value in the type of the graph's numbers."""
        return self.node("Cast", value, to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def reshaped(self, value: str, *shape: int) -> str:
        """Gives a value in another shape; -1 is what is left."""
        return self.node("Reshape", value, self.whole(*shape))

    def ranked(self, value: str, rank: int, *, largest: bool) -> str:
        """Gives the value that is the rank-th smallest or largest over the first axis."""
        name, rest = self.fresh(), self.fresh()
        node = helper.make_node("TopK", [value, self.whole(rank)], [name, rest], axis=0, largest=int(largest), sorted=1)
        self.model.graph.node.append(node)
        return self.node("Gather", name, self.constant(rank - 1, np.int64), axis=0)

    def size(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> None:
        """Says what one row of an input looks like: the masks are of these sizes, so a runtime takes no others."""
        infos = {info.name: info for info in self.model.graph.input}
        for name, shape in zip(names, sizes, strict=True):
            for axis, size in zip(infos[name].type.tensor_type.shape.dim[1:], shape, strict=True):
                axis.dim_value = size

    def finish(self, outputs: Mapping[str, tuple[int, ...]]) -> None:
        """Says which values the graph gives, in which shape for one row, and takes out what none of them needs."""
        part = pruned(self.model, [*outputs], [*self.model.graph.input])
        self.model.graph.CopyFrom(part.graph)
        del self.model.graph.output[:]
        for name, shape in outputs.items():
            kind = TensorProto.INT64 if name == LABEL else helper.np_dtype_to_tensor_dtype(self.dtype)
            self.model.graph.output.append(helper.make_tensor_value_info(name, kind, ["rows", *shape]))
        onnx.checker.check_model(self.model)


def all_passes(
    model: "onnx.ModelProto", slots: tuple[Slot, ...], trace: Trace, drawn: Mapping[str, Array], output: str, *,
    passes: int, folds: bool, shape: tuple[int, ...],
) -> tuple[Builder, str]:  # fmt: skip
    """Gives a graph that runs all passes, and the value that holds them: (T, N, ...).

    Args:
        model: a graph whose slots are inputs.
        slots: its slots.
        trace: how everything follows the rows.
        drawn: the draws of all passes by site, (T, ...).
        output: the value that one pass gives.
        passes: how many there are.
        folds: whether repeated rows give the right answer.
        shape: of one row's output.
    """
    masks = {slot.mask for slot in slots}
    whole = _own_names(_modern(model, output))
    builder = Builder(onnx.ModelProto(ir_version=min(max(whole.ir_version, 8), _IR)))
    graph = builder.model.graph
    builder.model.opset_import.extend(whole.opset_import)
    graph.name = "posterior"
    graph.input.extend(info for info in whole.graph.input if info.name not in masks)
    graph.initializer.extend(whole.graph.initializer)
    random = depends_on(whole.graph, masks)
    ours = [node for node in whole.graph.node if set(node.output) & random]
    graph.node.extend(node for node in whole.graph.node if not set(node.output) & random)
    values = {slot.mask: [slot.values(drawn[name]) for name in trace.of_slot[slot.mask]] for slot in slots}
    inputs = {info.name for info in whole.graph.input}
    output = output if output in inputs else f"{PREFIX}{output}"
    border = {name if name in inputs else f"{PREFIX}{name}": axis for name, axis in trace.border.items()}
    trace = replace(trace, border=border)
    if folds:
        return builder, _folded(builder, ours, slots, trace, values, output, passes, shape)
    return builder, _written_out(builder, ours, slots, trace, values, output, passes, shape)


def _modern(model: Any, output: str) -> Any:
    """The same graph, as far as its output needs it, in operators that are new enough."""
    if opset(model) >= _OLDEST:
        return model
    part = pruned(model, [output], [*model.graph.input])
    try:
        return version_converter.convert_version(part, OPSET)
    except Exception as error:  # raised from C++ under several names
        raise ModelRefused(
            f"the graph's operators (opset {opset(model)}) cannot be brought up to opset {OPSET}: {error}"
        ) from error


def _own_names(model: Any) -> Any:
    """The same graph with a prefix on every name but those of inputs, so that none is that of an output to come."""
    kept = {info.name for info in model.graph.input}
    made = {name for node in model.graph.node for name in node.output if name}
    rename = {name: f"{PREFIX}{name}" for name in (made | {one.name for one in model.graph.initializer}) - kept}
    own = onnx.ModelProto()
    own.CopyFrom(model)
    del own.graph.node[:]
    own.graph.node.extend(_renamed(node, rename, outputs=True) for node in model.graph.node)
    for tensor in own.graph.initializer:
        tensor.name = rename.get(tensor.name, tensor.name)
    return own


# -- all passes at a time ----------------------------------------------------------------------------------------------


def _folded(
    builder: Builder, nodes: list[Any], slots: tuple[Slot, ...], trace: Trace, values: Mapping[str, list[Array]],
    output: str, passes: int, shape: tuple[int, ...],
) -> str:  # fmt: skip
    rename = {name: _repeated(builder, name, axis, passes) for name, axis in trace.border.items() if axis is not None}
    count = _row_count(builder)
    places = {slot.mask: _placed(slot, trace, values[slot.mask]) for slot in slots}
    for node in nodes:
        node = _renamed(node, rename)
        slot = next((slot for slot in slots if node.op_type == "Mul" and slot.mask == node.input[-1]), None)
        if slot is not None and not slot.loop:
            _multiplied(builder, node, trace.layouts[slot.mask], places[slot.mask])
            continue
        for slot in slots:
            if slot.mask in _names(node) and slot.mask not in rename:
                rename[slot.mask] = _spread(builder, slot, trace.layouts[slot.mask], places[slot.mask], count)
        builder.model.graph.node.append(_renamed(node, rename))
    return builder.reshaped(output, passes, -1, *shape)


def _repeated(builder: Builder, name: str, axis: Axis, passes: int) -> str:
    """A value that enters the random part, for all passes."""
    if axis.axis is None:  # numbers that are linear in the rows
        grown = builder.node("Mul", name, builder.constant(passes, axis.base.dtype))
        return builder.node("Sub", grown, builder.constant((passes - 1) * axis.base, axis.base.dtype))
    times = [1] * axis.rank
    times[axis.axis] = passes
    return builder.node("Tile", name, builder.whole(*times))


def _row_count(builder: Builder) -> str:
    """The number of rows, (1,)."""
    return builder.node("Shape", builder.model.graph.input[0].name, start=0, end=1)


def _placed(slot: Slot, trace: Trace, values: list[Array]) -> Array:
    """The masks of all passes with the passes, and an axis of one for the rows, where the draw has its rows."""
    layout = trace.layouts[slot.mask]
    if slot.mask in trace.absent or layout is None or layout.axis is None:
        raise ModelRefused(f"the masks of {slot.path} cannot be written as constants")
    at = layout.axis
    steps = [np.expand_dims(np.moveaxis(v.reshape(-1, *trace.units[slot.mask]), 0, at), at + 1) for v in values]
    return of_steps(steps) if slot.loop else steps[0]


def _multiplied(builder: Builder, node: Any, layout: Axis | None, mask: Array) -> None:
    """Dropout: the value opened into passes and rows, times a constant, and closed again."""
    assert layout is not None
    assert layout.axis is not None
    at, own = layout.axis, layout.multiple > 1
    before, after = mask.shape[:at], mask.shape[at + 2 + own :]
    opened = builder.reshaped(node.input[0], *before, mask.shape[at], -1, *mask.shape[at + 2 :])
    product = builder.node("Mul", opened, builder.constant(mask))
    builder.node("Reshape", product, builder.whole(*before, -1, *after), output=node.output[0])


def _spread(builder: Builder, slot: Slot, layout: Axis | None, mask: Array, count: str) -> str:
    """The masks of all passes for all rows, where a draw is more than a factor."""
    assert layout is not None
    assert layout.axis is not None
    at, own = layout.axis + bool(slot.loop), layout.multiple > 1
    parts = [builder.whole(*mask.shape[: at + 1]), count]
    if mask.shape[at + 2 :]:
        parts.append(builder.whole(*mask.shape[at + 2 :]))
    grown = builder.node("Expand", builder.constant(mask), builder.node("Concat", *parts, axis=0))
    return builder.reshaped(grown, *mask.shape[:at], -1, *mask.shape[at + 2 + own :])


# -- pass by pass ------------------------------------------------------------------------------------------------------


def _written_out(
    builder: Builder, nodes: list[Any], slots: tuple[Slot, ...], trace: Trace, values: Mapping[str, list[Array]],
    output: str, passes: int, shape: tuple[int, ...],
) -> str:  # fmt: skip
    each = []
    for t in range(passes):
        rename: dict[str, str] = {}
        for slot in slots:
            layout = trace.layouts[slot.mask]
            if slot.loop or slot.mask in trace.absent or (layout is not None and layout.multiple > 1):
                raise ModelRefused(f"the masks of {slot.path or 'the network'} cannot be written out pass by pass")
            mask = values[slot.mask][0].reshape(-1, *trace.units[slot.mask])[t]
            at = None if layout is None else layout.axis
            rename[slot.mask] = builder.constant(mask if at is None else np.expand_dims(mask, at))
        for node in nodes:
            rename |= {name: f"{name}.pass{t}" for name in node.output if name}
            builder.model.graph.node.append(_renamed(node, rename, outputs=True))
        each.append(builder.reshaped(rename[output], 1, -1, *shape))
    return builder.node("Concat", *each, axis=0)


# -- names -------------------------------------------------------------------------------------------------------------


def _names(node: Any) -> set[str]:
    """Every value that a node or its bodies name as an input."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
            names |= {name for inner in body.node for name in _names(inner)}
    return names


def _renamed(node: Any, rename: Mapping[str, str], *, outputs: bool = False) -> Any:
    """Gives a copy of a node that reads (and, with ``outputs``, makes) other values."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for i, name in enumerate(copy.input):
        copy.input[i] = rename.get(name, name)
    if outputs:
        copy.name = ""
        for i, name in enumerate(copy.output):
            copy.output[i] = rename.get(name, name)
    for attribute in copy.attribute:
        for body in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
            inner = [_renamed(one, rename) for one in body.node]
            del body.node[:]
            body.node.extend(inner)
            for result in body.output:
                result.name = rename.get(result.name, result.name)
    return copy
