"""Sessions of onnxruntime: made and run so that its errors are ours and no run goes on for ever."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from mcdrop.errors import InputError, ModelRefused
from mcdrop.onnx_bodies import IN_BRANCH, OF_STEP
from mcdrop.quiet import first_line

__all__ = ["attempted", "described", "ended", "providers", "run_plain", "session"]

_LOOK_SECONDS = 120.0  # a look at a few rows that takes longer is ended: a graph can loop for ever

Array = NDArray[Any]
Feeds = dict[str, Array]


def providers() -> list[str]:
    """The execution providers that are used: CUDA where it is there, else the CPU."""
    present = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in present]


def session(model: "onnx.ModelProto") -> onnxruntime.InferenceSession:
    """Gives a session of a graph.

    Raises:
        ModelRefused: the runtime does not take the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads are to leave the machine
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers())
    except Exception as error:  # the runtime's own errors share no base
        raise ModelRefused(f"onnxruntime does not take this graph: {first_line(error)}") from error


def ended(one: Any, names: list[str], feeds: Feeds) -> list[Any]:
    """Runs a session, and ends the run when it takes too long."""
    options = onnxruntime.RunOptions()
    timer = threading.Timer(_LOOK_SECONDS, lambda: setattr(options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        values: list[Any] = one.run(names, feeds, options)
    finally:
        timer.cancel()
    return values


def attempted(one: Any, names: list[str], feeds: Feeds, *, loops: bool) -> list[Any]:
    """Runs a session on rows that it may not take, such as the number of a word that it does not know.

    One with ``loops`` may take steps without end on some rows, so it is ended when it takes too long.

    Raises:
        InputError: it does not take them.
        ModelRefused: a branch with draws runs that did not run on the example.
    """
    try:
        values: list[Any] = ended(one, names, feeds) if loops else one.run(names, feeds)
    except Exception as error:  # the runtime's own errors share no base
        if IN_BRANCH in str(error):
            raise ModelRefused(
                "a branch with draws ran that did not run on the example; wrap the graph with example rows that take it"
            ) from error
        if OF_STEP in str(error):
            raise InputError(
                "a loop with draws takes more steps than where it was first seen, on the example with its draws off; "
                "wrap the graph with example rows that take the most, or, where the draws themselves say how many, "
                "with a loop of a fixed number of steps"
            ) from error
        raise InputError(f"the graph cannot take these rows: {first_line(error)}") from error
    return values


def run_plain(data: bytes, inputs: Sequence[Array]) -> Feeds:
    """Runs a graph as any server would: inputs in order in their types, outputs by name."""
    plain = session(onnx.ModelProto.FromString(data))
    feeds = {}
    for info, value in zip(plain.get_inputs(), inputs, strict=True):
        kind = onnx.helper.tensor_dtype_to_np_dtype(described(info).type.tensor_type.elem_type)
        feeds[info.name] = np.ascontiguousarray(value, kind)
    names = [info.name for info in plain.get_outputs()]
    return dict(zip(names, plain.run(names, feeds), strict=True))


def described(value: Any) -> Any:
    """What a session says of one of its outputs, as the description of an input of any shape.

    Raises:
        ModelRefused: it is no tensor.
    """
    if not value.type.startswith("tensor("):
        raise ModelRefused(
            f"{value.name} is a {value.type}, which cannot be handed on to the part of the graph that draws"
        )
    kind = value.type.removeprefix("tensor(").removesuffix(")").upper()
    return onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.DataType.Value(kind), None)
