"""Draws inside the bodies of If, Loop and Scan: masks are taken in, shapes are brought out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mcdrop.onnx_graph import Chain

__all__ = ["ABSENT", "LOOPS", "OF_STEP", "into_loop", "of_steps", "shape_outside"]

LOOPS = ("Loop", "Scan")
OF_STEP = ".of_step"  # how the names of nodes end that take the masks of a step
ABSENT = -1  # what stands for the shape of a draw in a branch that does not run


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
        if node.op_type == "Loop":
            new.extend(_gather(mask, body.input[0].name, step))
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
        return step, node.name or node.output[0]
    return mask, ""


def _gather(mask: str, index: str, output: str, steps_of: tuple[Any, Any] | None = None) -> list[Any]:
    """Nodes that take the masks of steps; of all steps of a Scan, counted on its first scanned input."""
    nodes = []

    def number(name: str, value: int) -> str:
        scalar = helper.make_tensor(name, TensorProto.INT64, [], [value])
        nodes.append(helper.make_node("Constant", [], [name], value=scalar))
        return name

    zero = number(f"{output}.zero", 0)
    if steps_of is not None:
        node, body = steps_of
        given = {attribute.name: attribute for attribute in node.attribute}
        scanned = node.input[len(body.input) - given["num_scan_inputs"].i]
        axis = given["scan_input_axes"].ints[0] if "scan_input_axes" in given else 0
        nodes.append(helper.make_node("Shape", [scanned], [f"{index}.shape"]))
        at = number(f"{index}.axis", axis)
        nodes.append(helper.make_node("Gather", [f"{index}.shape", at], [f"{index}.steps"], axis=0))
        one = number(f"{index}.one", 1)
        nodes.append(helper.make_node("Range", [zero, f"{index}.steps", one], [index]))
    nodes.append(helper.make_node("Shape", [mask], [f"{output}.shape"]))
    nodes.append(helper.make_node("Gather", [f"{output}.shape", zero], [f"{output}.count"], axis=0))
    first = number(f"{output}.first", 1)
    nodes.append(helper.make_node("Sub", [f"{output}.count", first], [f"{output}.masks"]))
    nodes.append(helper.make_node("Sign", [f"{output}.masks"], [f"{output}.several"]))
    nodes.append(helper.make_node("Add", [index, first], [f"{output}.next"]))
    nodes.append(helper.make_node("Mul", [f"{output}.next", f"{output}.several"], [f"{output}.index"]))
    nodes.append(helper.make_node("Gather", [mask, f"{output}.index"], [output], axis=0, name=f"{mask}{OF_STEP}"))
    return nodes


def of_steps(masks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Gives what is fed for the masks of all steps: one entry that no step takes, then theirs."""
    broadcast = np.broadcast_arrays(*masks)
    return np.stack([broadcast[0], *broadcast])


def shape_outside(chain: Chain, like: str, mask: str, new: list[Any]) -> str:
    """Carries the shape of a value in a body out to the top; gives the value that holds it there.

    A loop gives the shapes of all its steps, a branch that does not run gives ``ABSENT``.
    """
    name = f"{mask}.shape"
    new.append(helper.make_node("Shape", [like], [name]))
    for level, (_, node, taken) in reversed([*enumerate(chain)]):
        outer = f"{mask}.shape.{level}"
        for attribute in node.attribute:
            if not attribute.HasField("g"):
                continue
            value = name
            if attribute.name != taken:  # the other branch of an If
                value = f"{mask}.absent.{level}"
                none = helper.make_tensor(value, TensorProto.INT64, [1], [ABSENT])
                attribute.g.node.append(helper.make_node("Constant", [], [value], value=none))
            attribute.g.output.append(helper.make_tensor_value_info(value, TensorProto.INT64, [None]))
        node.output.append(outer)
        name = outer
    return name
