"""What an export changed in the network that was trained, and how to export it with its dropout."""

from collections.abc import Collection, Iterable, Set
from typing import Any

from mcdrop.onnx_draws import DRAWS
from mcdrop.onnx_graph import Graph, Node, Place, every_graph, following, walk
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
_OPTIMISED = "com.microsoft.nchwc"  # operators that only the optimiser of onnxruntime brings in

_SOFTMAXES = ("BiasSoftmax", "QLinearSoftmax", "Softmax")
_TYPES = ("Cast", "CastLike")
_SHAPING = (*_TYPES, "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_QUANTISING = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
_WEIGHTS = (*_SHAPING, *_QUANTISING, "Div", "Mul", "Where")  # what attention does with its weights,
_SCORES = (*_WEIGHTS, "Add", "Clip", "Concat", "Max", "Min", "Sub", "Tanh")  # with the scores that they are made of,
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not")
_MASKS = (*_SHAPING, *_COMPARISONS, "Add", "Div", "Floor", "Mul", "Sub", "Where")  # and dropout with random numbers


def lost(model: Any, norms: list[str], inject: Collection[str]) -> list[str]:
    """Says what was lost in a graph whose draws are still there.

    ``norms`` are the batch norms that were set back, ``inject`` names the nodes after which dropout will be put.
    """
    said = [f"batch norm {path} was exported in training mode; its running statistics are used" for path in norms]
    if any(entry.domain == _OPTIMISED for entry in model.opset_import):
        said.append("onnxruntime's optimiser wrote this graph, and it takes Dropout out; wrap the graph from before it")
    if told(model):  # then mcdrop wrote it, and lost nothing
        return said
    for what, paths in (
        ("attention without dropout", _attention_without_dropout(model)),
        ("recurrent layers without dropout before the next one", _recurrent_without_dropout(model)),
    ):
        bare = [path for path in paths if path not in inject]
        if bare:
            said.append(
                f"{what} at {', '.join(bare)}: exporters lose it; if the network was trained with it, load with "
                f"inject={{{bare[0]!r}: p}} or save the network with mcdrop"
            )
    fused = [place.path for place in walk(model.graph) if place.node.op_type.endswith("Attention")]
    if fused:
        said.append(
            f"attention in one operator, so without dropout, at {', '.join(fused)}: inject after it would drop what it "
            "answers, not its weights; if the network was trained with dropout there, save it with mcdrop.save(mcdrop."
            "wrap(model, ...), folder, format='onnx'), or export it with an opset below 23 and inject after its Softmax"
        )
    return said


def _attention_without_dropout(model: Any) -> list[str]:
    """Names every softmax whose numbers weigh values in a matrix product with no draw in between."""
    moving = following(model.graph)
    for place in walk(model.graph):
        if place.node.op_type in _QUANTISING:
            moving -= {*place.node.output[1:]}  # the scales of numbers are no numbers of their own
    return [path for graph in every_graph(model.graph) for path in _weighing(graph, moving)]


def _weighing(graph: Graph, moving: Set[str]) -> list[str]:
    """Names the softmaxes of one graph whose numbers weigh values.

    What goes straight into a product is taken for weights. So is what goes there on other ways, but only if it is made
    of scores, which are products themselves: the probabilities of classes, too, are multiplied with much.
    """
    of_two = [node for node in graph.node if _multiplies(node) and sum(name in moving for name in node.input) > 1]
    scores = _made_of(graph, of_two, _SCORES)
    masks = _made_of(graph, [node for node in graph.node if Place(graph, node).operator in DRAWS], _MASKS)
    held, scored, found = dict[str, set[str]](), set[str](), set[str]()
    for node in graph.node:
        weights = {path for name in node.input for path in held.get(name, ())}
        if node.op_type in _SOFTMAXES:
            path = Place(graph, node).path
            held[node.output[0]] = {path}
            scored |= set() if scores.isdisjoint(node.input) else {path}
        elif _multiplies(node) and any(name in moving and name not in held for name in node.input):
            straight = held.get(node.input[0], set()) if node.op_type == "MatMul" else set()
            found |= straight | (weights & scored)
        elif node.op_type in _WEIGHTS and weights & scored and masks.isdisjoint(node.input):
            held |= dict.fromkeys(node.output, weights & scored)
    return [path for node in graph.node if (path := Place(graph, node).path) in found]


def _multiplies(node: Node) -> bool:
    return "MatMul" in node.op_type or node.op_type in ("Einsum", "Gemm")


def _made_of(graph: Graph, sources: Iterable[Node], operators: Collection[str]) -> set[str]:
    """The values that some nodes make, and what some operators make of those."""
    found = {name for node in sources for name in node.output} - {""}
    for node in graph.node:
        if node.op_type in operators and not found.isdisjoint(node.input):
            found |= set(node.output) - {""}
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
