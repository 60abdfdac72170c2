"""Operations of a graph that run as one: layers and what follows them by oneDNN, on a GPU what follows by triton."""

from typing import Any, NamedTuple

import torch
from torch import fx

from mcdrop.blockwise import attend, takes
from mcdrop.kernels import CONV, LAYER_NORM, LINEAR, MATMUL
from mcdrop.masking import DTYPES, WIDEST, after_conv, masked, runs_on, summed
from mcdrop.onednn import Packed, available, conv, conv_add_relu, linear
from mcdrop.rewrites import alike, alone, replace, sizes, unfolded

__all__ = ["fuse"]

aten = torch.ops.aten


def fuse(graph: fx.Graph) -> None:
    """Lets convolutions over images take over a sum and a ReLU, and linear layers in bfloat16 a ReLU and their bias.

    Linear layers in float32 gain nothing by it. On a GPU one kernel does all that follows a convolution, another all of
    attention, and others multiply with a mask and take over the ReLU before it, or the sum and the norm after it.
    """
    _put_after_convs(graph)
    _put_attention(graph)
    _put_sums(graph)
    _put_masks(graph)
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


def _put_after_convs(graph: fx.Graph) -> None:
    """Lets one kernel do what follows a convolution on a GPU: bias and norm, a sum, a ReLU, a mask of channels."""
    for layer in [*graph.nodes]:
        value = layer.meta.get("val") if layer.target is CONV else None
        if value is None or value.dtype not in DTYPES or not runs_on(value.device):
            continue
        weight, *before = unfolded(*layer.args[1:3])
        axes = len(sizes(weight) or ()) - 2
        last, *after = _following(layer, axes)
        if last is layer and not any(before):
            continue
        with graph.inserting_before(last):
            alone = graph.call_function(CONV, (layer.args[0], weight, None, *layer.args[3:]))
            output = graph.call_function(after_conv, (alone, axes, *before, *after))
        alone.meta, output.meta = dict(layer.meta), dict(last.meta)
        replace(last, output)
    graph.eliminate_dead_code()


def _following(layer: fx.Node, axes: int) -> tuple[fx.Node, fx.Node | None, bool, fx.Node | None]:
    """Gives the last node of what follows a convolution, what is added, whether there is a ReLU, and the mask."""
    last, other, mask = layer, None, None
    if user := _only_user(last, aten.add.Tensor):
        term = _beside(user, last)
        if not user.kwargs and term is not None and alike(term, last):
            last, other = user, term
    relu = _only_user(last, aten.relu.default)
    last = relu or last
    if user := _only_user(last, aten.mul.Tensor):
        factor, channels = _beside(user, last), (sizes(layer) or ())[-axes - 1]
        if _places(user, last, factor) == axes and (sizes(factor) or ())[2:3] == (channels,):  # type: ignore[arg-type]
            last, mask = user, factor
    return last, other, relu is not None, mask


def _beside(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The other tensor that an operation of two reads."""
    return next((other for other in node.args if isinstance(other, fx.Node) and other is not one), None)


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    """What alone reads a node, where that is a certain operation."""
    return next((user for user in node.users if len(node.users) == 1 and user.target is target), None)


class _Scores(NamedTuple):
    """What a softmax of attention is of."""

    query: fx.Node
    keys: fx.Node
    scale: float
    bias: fx.Node | None
    hidden: fx.Node | None


def _put_attention(graph: fx.Graph) -> None:
    """Lets one kernel do all of attention whose weights are multiplied with a mask, on a GPU."""
    for product in [*graph.nodes]:
        if product.target is not MATMUL or not runs_on(product.meta["val"].device):
            continue
        weights, values = product.args
        for softmax, mask in (weights.args, weights.args[::-1]) if alone(weights, aten.mul.Tensor) else ():
            scores = _scores(softmax)
            if scores is None or not _heads(product, scores, mask, values):
                continue
            value, units = product.meta["val"], (sizes(scores.query) or ())[-1]
            if takes(value.device, value.dtype, units, (sizes(values) or ())[-1]):
                with graph.inserting_before(product):
                    given = (scores.query, scores.keys, values, mask, scores.scale, _hiding(graph, scores))
                    output = graph.call_function(attend, given)
                output.meta = dict(product.meta)
                replace(product, output)
                break
    graph.eliminate_dead_code()


def _scores(softmax: Any) -> _Scores | None:
    """Reads what a softmax over the last axis is of; None where that is no product of queries and keys."""
    if not alone(softmax, aten._softmax.default):
        return None
    node, axis, widened = softmax.args
    scale, bias, hidden = 1.0, None, None
    if widened or axis not in (-1, len(sizes(softmax) or ()) - 1):
        return None
    if alone(node, aten.masked_fill.Scalar) and node.args[2] == -torch.inf:
        node, hidden = node.args[:2]
    if alone(node, aten.add.Tensor) and not node.kwargs:
        inner = next((one for one in node.args if alone(one, MATMUL, aten.mul.Tensor, aten.div.Tensor)), None)
        node, bias = inner, _beside(node, inner)  # type: ignore[arg-type]
        if bias is None:
            return None
    if alone(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], int | float):
        scale = float(node.args[1]) if node.target is aten.mul.Tensor else 1.0 / node.args[1]
        node = node.args[0]
    if not alone(node, MATMUL):
        return None
    query, keys = node.args
    return _Scores(query, keys, scale, bias, hidden)


def _hiding(graph: fx.Graph, scores: _Scores) -> fx.Node | None:
    """What is added to scores, where hidden ones are told apart: less than any number to these."""
    if scores.hidden is None:
        return scores.bias
    bias: Any = 0.0 if scores.bias is None else scores.bias
    output = graph.call_function(torch.where, (scores.hidden, -torch.inf, bias))
    value = scores.hidden.meta["val"].to(torch.get_default_dtype())
    output.meta["val"] = value if scores.bias is None else value + bias.meta["val"]
    return output


def _heads(product: fx.Node, scores: _Scores, mask: Any, values: Any) -> bool:
    """Whether attention is over heads (T, N, H, ...) of one type, and masks are the same for all rows."""
    whole = sizes(product) or ()
    tensors = (scores.query, scores.keys, values, mask)
    if len(whole) != 5 or not all(isinstance(one, fx.Node) for one in tensors):
        return False
    values_of = [one.meta.get("val") for one in (*tensors, *([scores.bias] if scores.bias is not None else []))]
    if len({getattr(one, "dtype", None) for one in values_of}) > 1:
        return False
    seen, steps = (sizes(scores.keys) or (None,))[-1], (sizes(scores.query) or ())[-2]
    same = steps == whole[3] and all((sizes(one) or ())[-4:-2] == whole[1:3] for one in tensors[:3])
    return same and sizes(mask) == (whole[0], 1, *whole[2:4], seen)


def _put_sums(graph: fx.Graph) -> None:
    """Lets one kernel multiply with a mask, add what goes around the layer before it, and take the norm, on a GPU."""
    for node in [*graph.nodes]:
        total = _only_user(node, aten.add.Tensor) if node.target is aten.mul.Tensor else None
        if total is None or total.kwargs or not runs_on(node.meta["val"].device):
            continue
        other, whole = _beside(total, node), sizes(node) or ()
        if other is None or not isinstance(whole[-1], int) or whole[-1] > WIDEST or not _like(other, node):
            continue
        for x, mask in (node.args, node.args[::-1]):
            if _places(node, x, mask) != 0:
                continue
            norm = _only_user(total, LAYER_NORM)
            norm = norm if norm is not None and [*norm.args[1]] == [whole[-1]] else None  # type: ignore[misc]
            last, how = (total, (None, None, 0.0)) if norm is None else (norm, norm.args[2:])
            with graph.inserting_before(last):
                output = graph.call_function(summed, (x, mask, other, norm is not None, *how))
            output.meta = dict(last.meta)
            replace(last, output)
            break
    graph.eliminate_dead_code()


def _like(other: fx.Node, node: fx.Node) -> bool:
    """Whether a node gives tensors of another's type and shape, or of its shape for one pass."""
    value, whole = other.meta.get("val"), sizes(node) or ()  # a number of rows has none
    same = isinstance(value, torch.Tensor) and value.dtype == node.meta["val"].dtype
    return same and sizes(other) in (whole, whole[1:])


def _put_masks(graph: fx.Graph) -> None:
    """Lets one kernel multiply with a mask, and take the ReLU before it, on a GPU."""
    for node in [*graph.nodes]:
        if node.target is not aten.mul.Tensor or not runs_on(node.meta["val"].device):
            continue
        for x, mask in (node.args, node.args[::-1]):
            trailing = _places(node, x, mask)
            if trailing is None:
                continue
            relu = x.target is aten.relu.default and len(x.users) == 1
            with graph.inserting_before(node):
                output = graph.call_function(masked, (x.args[0] if relu else x, mask, trailing, relu))
            output.meta = dict(node.meta)
            replace(node, output)
            break
    graph.eliminate_dead_code()


def _places(node: fx.Node, x: Any, mask: Any) -> int | None:
    """On how many of its last axes a mask (T, 1, units, 1) is the same; None where it is no such mask of ``x``."""
    if not isinstance(x, fx.Node) or not isinstance(mask, fx.Node):
        return None
    whole, own, units = sizes(node) or (), sizes(x), sizes(mask) or ()
    if len(whole) < 3 or len(units) != len(whole) or own not in (whole, whole[1:]):
        return None
    dtypes = {one.meta["val"].dtype for one in (node, x, mask)}
    if units[0] != whole[0] or units[1] != 1 or len(dtypes) > 1 or not dtypes <= DTYPES:
        return None
    trailing = next((k for k, size in enumerate(units[:1:-1]) if size != 1), len(units) - 2)
    return trailing if units[2 : len(units) - trailing] == whole[2 : len(whole) - trailing] else None


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
        if user.target is Packed and user.args[1:] == how:
            return user  # type: ignore[no-any-return]
    with graph.inserting_after(weight):
        return graph.call_function(Packed, (weight, *how))
