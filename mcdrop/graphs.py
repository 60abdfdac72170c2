"""A model as an ONNX graph that still draws: its own graph, or what its torch network is exported to."""

from itertools import count
from typing import TYPE_CHECKING

from mcdrop.errors import MissingExtra
from mcdrop.model import Model

if TYPE_CHECKING:
    from mcdrop.backends.onnx import OnnxBackend
    from mcdrop.onnx_discover import Graph

__all__ = ["graph_backend", "graph_of"]

OUTPUT = "output"


def graph_of(model: Model) -> "Graph":
    """Gives a model's graph.

    Raises:
        ModelRefused: its network cannot be written as a graph.
        MissingExtra: onnx, onnxruntime or onnxscript is not installed.
    """
    try:
        from mcdrop.onnx_discover import Graph
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from None
    if isinstance(model.module, Graph):
        return model.module
    from mcdrop.features import is_perceptron
    from mcdrop.onnx_export import stochastic_graph
    from mcdrop.onnx_inputs import PERCEPTRON

    names = [spec.name for spec in model.inputs]
    output = next(name for n in count() if (name := f"{OUTPUT}{n or ''}") not in names)
    graph = stochastic_graph(model.backend, model.example, names, output)  # type: ignore[arg-type]
    if is_perceptron(model.module):
        graph.metadata_props.add(key=PERCEPTRON, value="")
    return Graph(graph.SerializeToString(deterministic=True), output, {})


def graph_backend(model: Model) -> "OnnxBackend":
    """Gives what runs a model's graph on onnxruntime."""
    graph = graph_of(model)
    from mcdrop.backends.onnx import OnnxBackend
    from mcdrop.onnx_discover import discover_graph

    if isinstance(model.backend, OnnxBackend):
        return model.backend
    return discover_graph(graph.data, model.example, output=graph.output).backend
