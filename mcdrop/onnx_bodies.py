"""Draws inside the bodies of If, Loop and Scan: masks are taken in, shapes are brought out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mcdrop.onnx_graph import Chain, Node

__all__ = [
    "ABSENT",
    "IN_BRANCH",
    "LOOPS",
    "NO_AXIS",
    "OF_STEP",
    "into_branch",
    "into_loop",
    "loop_name",
    "none_drawn",
    "of_steps",
    "shape_outside",
]

LOOPS = ("Loop", "Scan")
OF_STEP = ".of_step"  # how the names of nodes end that take the masks of a step
IN_BRANCH = ".in_branch"  # and of those that end the run of a branch that was fed no masks
ABSENT, NO_AXIS = -1, -2  # what stands for a shape in a branch that does not run, and for what is no axis
_AXES = 16  # more than any value has


def into_loop(chain: Chain, mask: str, new: list[Any]) -> tuple[str, str]:
    """Takes the mask of one step inside a loop; gives it with the loop's name, which is empty outside of any.

    What is fed comes from ``of_steps``; a single entry stands for all steps, which is enough to switch the draw off. A
    step that has no mask ends the run with an error that names a node ``...OF_STEP``. Nodes for the place of the draw
    are put into ``new``.
    """
    for graph, node, taken in chain:
        if node.op_type not in LOOPS:
            continue
        body = next(attribute.g for attribute in node.attribute if attribute.name == taken)
        step = f"{mask}.step"
        if node.op_type == "Loop":  # which may count its steps in a number or in a list of one
            plain = _constant(new, f"{step}.plain", ())
            new.append(helper.make_node("Reshape", [body.input[0].name, plain], [f"{step}.number"]))
            new.extend(_gather(mask, f"{step}.number", step))
        else:
            outside = _gather(mask, f"{mask}.range", f"{mask}.steps", steps_of=(node, body))
            at = list(graph.node).index(node)
            for offset, one in enumerate(outside):
                graph.node.insert(at + offset, one)
            node.input.append(f"{mask}.steps")
            body.input.append(helper.make_tensor_value_info(step, TensorProto.FLOAT, None))
            for attribute in node.attribute:
                if attribute.name == "num_scan_inputs":
                    attribute.i += 1
                elif attribute.name in ("scan_input_axes", "scan_input_directions"):
                    attribute.ints.append(0)
        return step, loop_name(node)
    return mask, ""


def loop_name(node: Node) -> str:
    """Gives the name of a loop: that of its node, or of what it makes first."""
    return str(node.name or node.output[0])


def _gather(mask: str, index: str, output: str, steps_of: tuple[Any, Any] | None = None) -> list[Any]:
    """Nodes that take the masks of steps; of all steps of a Scan, counted on its first scanned input."""
    nodes = list[Any]()
    zero = _constant(nodes, f"{output}.zero", 0)
    if steps_of is not None:
        node, body = steps_of
        given = {attribute.name: attribute for attribute in node.attribute}
        scanned = node.input[len(body.input) - given["num_scan_inputs"].i]
        axis = given["scan_input_axes"].ints[0] if "scan_input_axes" in given else 0
        nodes.append(helper.make_node("Shape", [scanned], [f"{index}.shape"]))
        at = _constant(nodes, f"{index}.axis", axis)
        nodes.append(helper.make_node("Gather", [f"{index}.shape", at], [f"{index}.steps"], axis=0))
        one = _constant(nodes, f"{index}.one", 1)
        nodes.append(helper.make_node("Range", [zero, f"{index}.steps", one], [index]))
    nodes.append(helper.make_node("Shape", [mask], [f"{output}.shape"]))
    nodes.append(helper.make_node("Gather", [f"{output}.shape", zero], [f"{output}.count"], axis=0))
    first = _constant(nodes, f"{output}.first", 1)
    nodes.append(helper.make_node("Sub", [f"{output}.count", first], [f"{output}.masks"]))
    nodes.append(helper.make_node("Sign", [f"{output}.masks"], [f"{output}.several"]))
    nodes.append(helper.make_node("Add", [index, first], [f"{output}.next"]))
    nodes.append(helper.make_node("Mul", [f"{output}.next", f"{output}.several"], [f"{output}.index"]))
    nodes.append(helper.make_node("Gather", [mask, f"{output}.index"], [output], axis=0, name=f"{mask}{OF_STEP}"))
    return nodes


def into_branch(mask: str, new: list[Any]) -> str:
    """Takes a mask inside a branch; gives it unchanged, but ends the run where ``none_drawn`` was fed.

    The error names a node ``...IN_BRANCH``. It cannot be lost on its way to the output, as NaN is by comparisons, casts
    and maxima.
    """

    def node(operator: str, *inputs: str, **given: Any) -> str:
        new.append(helper.make_node(operator, inputs, [f"{mask}.{operator.lower()}{len(new)}"], **given))
        return str(new[-1].output[0])

    some = node("Cast", node("Cast", node("Size", mask), to=TensorProto.BOOL), to=TensorProto.INT64)
    missing = node("Sub", _constant(new, f"{mask}.one", [1]), some)
    # one number has the shape (), but not the shape (2,); runtimes check shapes wherever they compute
    shape = node("Tile", _constant(new, f"{mask}.two", [2]), missing)
    gate = node("Reshape", _constant(new, f"{mask}.gate", 1.0, TensorProto.FLOAT), shape, name=f"{mask}{IN_BRANCH}")
    return node("Mul", mask, gate)


def none_drawn(loop: bool) -> NDArray[Any]:
    """Gives what is fed for the mask of a draw in a branch that did not run: nothing, for all steps of a loop."""
    return np.empty((1, 0) if loop else (0,), np.float32)


def of_steps(masks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Gives what is fed for the masks of all steps: one entry that no step takes, then theirs."""
    broadcast = np.broadcast_arrays(*masks)
    return np.stack([broadcast[0], *broadcast])


def shape_outside(chain: Chain, like: str, mask: str, new: list[Any]) -> str:
    """Carries the shape of a value in a body out to the top; gives the value that holds it there.

    A loop gives the shapes of all its steps. Where there is a branch, shapes end with ``NO_AXIS`` so that all are of
    one length, as old versions of If and all loops demand; a branch that does not run gives nothing but ``ABSENT``.
    """
    name = f"{mask}.shape"
    new.append(helper.make_node("Shape", [like], [name]))
    if any(node.op_type == "If" for _, node, _ in chain):
        rest, places = _constant(new, f"{name}.rest", [NO_AXIS] * _AXES), _constant(new, f"{name}.places", range(_AXES))
        new.append(helper.make_node("Concat", [name, rest], [f"{name}.long"], axis=0))
        new.append(helper.make_node("Gather", [f"{name}.long", places], [f"{name}.padded"], axis=0))
        name = f"{name}.padded"
    axes = 1  # a loop adds that of its steps
    for level, (_, node, taken) in reversed([*enumerate(chain)]):
        outer = f"{mask}.shape.{level}"
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
            if not attribute.HasField("g"):
                continue
            value, nodes = name, attribute.g.node
            if attribute.name != taken:  # the other branch of an If
                value = _constant(nodes, f"{mask}.absent.{level}", np.full([1] * (axes - 1) + [_AXES], ABSENT))
            attribute.g.output.append(helper.make_tensor_value_info(value, TensorProto.INT64, [None] * axes))
        node.output.append(outer)
        name, axes = outer, axes + (node.op_type in LOOPS)
    return name


def _constant(nodes: Any, name: str, value: Any, kind: int = TensorProto.INT64) -> str:
    """Puts a constant into nodes; gives its name."""
    array = np.asarray(value)
    tensor = helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())
    nodes.append(helper.make_node("Constant", [], [name], value=tensor))
    return name
