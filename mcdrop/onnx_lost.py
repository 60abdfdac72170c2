"""What an export changed in the network that was trained, and how to export it with its dropout."""

from collections.abc import Collection
from typing import Any

from mcdrop.onnx_graph import depends_on, walk
from mcdrop.onnx_slots import told

__all__ = ["RECIPE", "lost"]

RECIPE = (
    "export the network again with the dropout and recurrent layers in training mode and everything else in eval: "
    "model.eval(); [m.train() for m in model.modules() if 'Dropout' in type(m).__name__ or isinstance(m, "
    "torch.nn.RNNBase)]; torch.onnx.export(model, ..., dynamo=True); or mcdrop.save(mcdrop.wrap(model, ...), folder, "
    "format='onnx'), which keeps attention dropout too; or put dropout after named nodes with inject={'node': 0.1}"
)
_RECURRENT = ("GRU", "LSTM", "RNN")
_MOVES = ("Identity", "Reshape", "Squeeze", "Transpose")  # all that an exporter puts between two recurrent layers


def lost(model: Any, norms: list[str], inject: Collection[str]) -> list[str]:
    """Says what was lost in a graph whose draws are still there.

    ``norms`` are the batch norms that were set back, ``inject`` names the nodes after which dropout will be put.
    """
    said = [f"batch norm {path} was exported in training mode; its running statistics are used" for path in norms]
    if told(model):  # then mcdrop wrote it, and lost nothing
        return said
    for what, paths in (
        ("attention without dropout", _softmax_without_dropout(model)),
        ("recurrent layers without dropout before the next one", _recurrent_without_dropout(model)),
    ):
        bare = [path for path in paths if path not in inject]
        if bare:
            said.append(
                f"{what} at {', '.join(bare)}: exporters lose it; if the network was trained with it, load with "
                f"inject={{{bare[0]!r}: p}} or save the network with mcdrop"
            )
    return said


def _softmax_without_dropout(model: Any) -> list[str]:
    """Names every softmax that goes straight into a matrix product, as attention does where dropout was lost."""
    graph, found = model.graph, []
    inputs = {info.name for info in graph.input} - {tensor.name for tensor in graph.initializer}
    moving = depends_on(graph, inputs)
    for place in walk(graph):
        if place.operator == "Softmax" and not place.chain:
            users = [node for node in graph.node if place.node.output[0] in node.input]
            into = [node for node in users if node.op_type == "MatMul" and node.input[0] == place.node.output[0]]
            if any(len(node.input) > 1 and node.input[1] in moving for node in into):
                found.append(place.path)
    return found


def _recurrent_without_dropout(model: Any) -> list[str]:
    """Names every recurrent layer whose outputs go straight into another one."""
    top = [place for place in walk(model.graph) if not place.chain]
    makers = {place.node.output[0]: place for place in top if place.node.output}  # not of what a layer ends with
    found = []
    for place in top:
        if place.operator in _RECURRENT:
            maker = makers.get(place.node.input[0])
            while maker is not None and maker.operator in _MOVES:
                maker = makers.get(maker.node.input[0])
            if maker is not None and maker.operator in _RECURRENT:
                found.append(maker.path)
    return [*dict.fromkeys(found)]
