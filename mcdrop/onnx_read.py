"""An ONNX model read without running anything: checked, in one piece, its local functions put in line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import inliner, shape_inference

from mcdrop.barefile import kind_of, read_plain
from mcdrop.errors import ArtifactError, InputError, ModelRefused
from mcdrop.onnx_graph import every_graph, opset, walk

__all__ = ["read_graph"]

_BYTES = 2**31 - 1  # what protobuf can hold


def read_graph(source: "bytes | str | Path | onnx.ModelProto") -> "onnx.ModelProto":
    """Gives a checked model of one's own, its local functions put in line.

    Raises:
        ArtifactError: it is no ONNX model, keeps tensors in other files, or is too large for one.
        ModelRefused: a local function cannot be put in line.
    """
    data, name = _bytes(getattr(source, "model_proto", source))  # which torch.onnx.export(dynamo=True) gives
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        raise ArtifactError(f"{name} is not an ONNX model: it is cut off, damaged or something else") from error
    outside = sorted({_location(tensor) for tensor in _tensors(model) if _location(tensor)})
    if outside:
        raise ArtifactError(
            f"{name} keeps tensors in other files ({', '.join(map(repr, outside[:3]))}), which are not read; write it "
            "in one piece with onnx.save_model(onnx.load(path), new_path, save_as_external_data=False)"
        )
    try:
        model = _in_line(model) if model.functions else model
        onnx.checker.check_model(model)
    except ModelRefused:
        raise
    except Exception as error:  # the checker and the inliner raise errors of several C++ classes
        raise ArtifactError(f"{name} is not a sound ONNX model: {' '.join(str(error).split())[:300]}") from error
    if not _readable(model):
        raise ArtifactError(f"{name} is not a sound ONNX model: a name in it is no UTF-8 text")
    return model


def _in_line(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Puts local functions in line, those of another opset brought to that of the graph."""
    defaults = {(one.domain, one.name, one.overload): one.attribute_proto for one in model.functions}
    for holder in (model.graph, *model.functions):  # the inliner fills in what a call gives, but no defaults
        for node in (place.node for place in walk(holder)):
            given = {attribute.name for attribute in node.attribute}
            missing = defaults.get((node.domain, node.op_type, node.overload), ())
            node.attribute.extend(one for one in missing if one.name not in given)
    plain, why = inliner.inline_local_functions(model), ""
    if plain.functions:
        try:
            plain = inliner.inline_local_functions(shape_inference.infer_shapes(model), convert_version=True)
            onnx.checker.check_model(plain)
        except Exception as error:  # of several C++ classes, for whatever the converter does not know
            why = f": {' '.join(str(error).split())[:200]}"
    unset = [place.path for place in walk(plain.graph) if any(one.ref_attr_name for one in place.node.attribute)]
    if plain.functions or unset:
        left = ", ".join(f"{one.domain}:{one.name} (opset {opset(one)})" for one in plain.functions) or ", ".join(unset)
        raise ModelRefused(
            f"the graph (opset {opset(model)}) calls functions that cannot be put in line: {left}{why}; write it with "
            "functions of its own opset, or without any, as by onnx.inliner.inline_local_functions"
        )
    return plain


def _names(model: Any) -> Iterator[Any]:
    """Every name in a model; one that is no text is bytes, or an error, as protobuf's implementations have it."""
    for graph in every_graph(model.graph):
        yield graph.name
        yield from (one.name for one in (*graph.initializer, *graph.input, *graph.output, *graph.value_info))
        yield from (one.values.name for one in graph.sparse_initializer)
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)


def _readable(model: Any) -> bool:
    """Whether every name is text."""
    try:
        return all(isinstance(name, str) for name in _names(model))
    except UnicodeDecodeError:
        return False


def _bytes(source: Any) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "the model"
    if isinstance(source, str | Path):
        data = read_plain(Path(source), most=_BYTES)
        if kind_of(data, str(source)) != "onnx":
            raise ArtifactError(f"{source} is no ONNX graph; read it with mcdrop.load(path, task=..., example=rows)")
        return data, str(source)
    if hasattr(source, "SerializeToString"):
        name = source.graph.name or "the model"
        try:
            return source.SerializeToString(), name
        except Exception as error:  # protobuf's EncodeError, whose module differs between its implementations
            raise ArtifactError(
                f"{name} cannot be written in one piece: one ONNX file holds 2 GiB at most, and larger graphs are not "
                f"read; wrap the network that it was made of: {error}"
            ) from error
    session = vars(source) if hasattr(source, "get_inputs") else {}  # onnxruntime keeps what it was made of
    if session.get("_model_bytes"):
        return session["_model_bytes"], "the session's model"
    if session.get("_model_path"):
        return _bytes(Path(session["_model_path"]).resolve())
    raise InputError(f"a torch module or an ONNX graph is wanted, got {type(source).__name__}")


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever it may be."""
    nodes = [*(node for function in model.functions for node in function.node), *model.graph.node]
    graphs = [model.graph, *(info.algorithm for info in model.training_info)]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                sparse = (attribute.sparse_tensor, *attribute.sparse_tensors)
                yield from (part for one in sparse for part in (one.values, one.indices))
                graphs.extend([attribute.g] * attribute.HasField("g") + list(attribute.graphs))


def _location(tensor: Any) -> str:
    """Where a tensor lies outside of its file; empty where it does not."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "somewhere")
