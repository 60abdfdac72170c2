"""Layers of a graph handed to oneDNN, each with what follows it."""

from typing import Any

import torch
from torch import fx

from mcdrop.kernels import CONV, LINEAR
from mcdrop.onednn import available, conv, conv_add_relu, linear, packed
from mcdrop.rewrites import alike, replace, sizes

__all__ = ["fuse"]

aten = torch.ops.aten


def fuse(graph: fx.Graph) -> None:
    """Lets convolutions over images take over a sum and a ReLU, and linear layers in bfloat16 a ReLU and their bias.

    Linear layers in float32 gain nothing by it.
    """
    for node in [*graph.nodes]:
        source = node.args[0] if node.target is aten.relu.default else None
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        if _fits(source):
            _put(node, source, "relu")
        elif source.target is aten.add.Tensor and not source.kwargs:
            _put_sum(node, *source.args)
    graph.eliminate_dead_code()
    for node in [*graph.nodes]:
        if _fits(node):
            _put(node, node, "none")
    graph.eliminate_dead_code()


def _fits(node: Any) -> bool:
    """Whether a node is a layer that oneDNN should run."""
    if not isinstance(node, fx.Node) or node.target not in (CONV, LINEAR):
        return False
    value, weight = node.meta["val"], node.args[1]
    if not available(value.dtype, value.device) or not isinstance(weight, fx.Node):
        return False
    return len(sizes(weight) or ()) == 4 if node.target is CONV else bool(value.dtype == torch.bfloat16)


def _put(place: fx.Node, layer: fx.Node, then: str) -> None:
    """Puts a layer and what follows it in a node's place."""
    with place.graph.inserting_before(place):
        arguments = _packed(layer) if layer.target is CONV else layer.args
        output = place.graph.call_function(conv if layer.target is CONV else linear, (*arguments, then))
    output.meta = dict(place.meta)
    replace(place, output)


def _put_sum(place: fx.Node, *terms: Any) -> None:
    """Puts a convolution, its sum with another tensor and a ReLU in the ReLU's place, where that is what it is of."""
    for layer, other in (terms, terms[::-1]):
        if _fits(layer) and layer.target is CONV and len(layer.users) == 1 and isinstance(other, fx.Node):
            if not alike(layer, other):
                continue
            with place.graph.inserting_before(place):
                output = place.graph.call_function(conv_add_relu, (other, *_packed(layer)))
            output.meta = dict(place.meta)
            replace(place, output)
            return


def _packed(layer: fx.Node) -> tuple[Any, ...]:
    """The arguments of a convolution with its weight packed."""
    x, weight, bias, stride, padding, dilation, groups = layer.args
    return x, _pack(layer.graph, weight, stride, padding, dilation, groups), bias, stride, padding, dilation, groups


def _pack(graph: fx.Graph, weight: Any, *how: Any) -> fx.Node:
    for user in weight.users:
        if user.target is packed and user.args[1:] == how:
            return user  # type: ignore[no-any-return]
    with graph.inserting_after(weight):
        return graph.call_function(packed, (weight, *how))
