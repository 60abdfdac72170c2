"""Changes of a captured graph that leave its values alone and make it faster.

``REWRITES`` are applied to the whole graph in order, ``split_linear`` and ``channels_last`` after them;
``write_in_place`` and ``lower`` to each stage of it, once it is split. To add a change, add one function and one line.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mcdrop.active import Active, active_linear
from mcdrop.each_pass import EACH_PASS
from mcdrop.kernels import BATCH_NORM, CONV, LINEAR, RECURRENT, RUN
from mcdrop.masking import after_conv, masked, summed
from mcdrop.onednn import IN_PLACE, NARROW, ONEDNN, Packed, available, channels_put_last, narrow
from mcdrop.products import factors, times, times_

__all__ = [
    "REWRITES", "alike", "alone", "channels_last", "is_view", "lower", "replace", "sizes", "split_linear", "unfolded",
    "write_in_place",
]  # fmt: skip

aten = torch.ops.aten

_HOLD = (Active, Packed, channels_put_last)  # what they are given, or its memory, is read later
_WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_SHAPED = (aten.permute.default, aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.slice.Tensor)


def sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """Gives the sizes of a node's tensor, symbols as such; None where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape)


def replace(node: fx.Node, other: fx.Node) -> None:
    """Puts a node in the place of another."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def alone(node: Any, *targets: Any) -> fx.Node | None:
    """Gives a node that is one of some operations and is read by one other alone."""
    return node if isinstance(node, fx.Node) and node.target in targets and len(node.users) == 1 else None


def drop_copies(graph: fx.Graph) -> None:
    """Takes out copies, and changes of shape that change nothing: a graph without in-place writes needs none.

    Copies for the order in memory too: what needs another order, such as a reshape, makes a copy of its own.
    """
    for node in [*graph.nodes]:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or node.op != "call_function":
            continue
        copies = node.target in _COPIES and node.kwargs.get("memory_format") in (None, torch.contiguous_format)
        order = node.args[1] if node.target is aten.permute.default else None
        if node.target is aten.copy.default and alike(node.args[1], node):
            replace(node, node.args[1])
            continue
        same = node.target in _SHAPED and sizes(node) == sizes(source)
        if copies or (same and (order is None or [*order] == sorted(order))):
            replace(node, source)


def scale_masks(graph: fx.Graph) -> None:
    """Lets a mask of one byte a unit be turned into factors in one go: kept units times a number are real numbers."""
    for node in [*graph.nodes]:
        copied = node.args[0] if node.target is aten.mul.Tensor else None
        if not isinstance(copied, fx.Node) or copied.target is not aten._to_copy.default:
            continue
        (mask,) = copied.all_input_nodes
        value, scale = mask.meta.get("val"), node.args[1]
        real = isinstance(scale, float) and node.meta["val"].dtype == torch.float32
        if real and isinstance(value, Tensor) and value.dtype == torch.bool:
            node.args = (mask, scale)
            if not copied.users:
                graph.erase_node(copied)


def fold_norms(graph: fx.Graph) -> None:
    """Folds a batch norm in eval into the layer before it: scaled weights, shifted bias (Jacob et al. 2018, sec. 3.2).

    The folded weights are computed from those of today whenever passes are run, and cost next to nothing.
    """
    for node in [*graph.nodes]:
        layer = node.args[0] if node.target is BATCH_NORM else None
        if not isinstance(layer, fx.Node) or layer.target not in (CONV, LINEAR) or len(layer.users) > 1:
            continue
        mean, variance, gain, shift, eps = node.args[1:6]
        weight, bias = layer.args[1:3]
        shape = sizes(weight) if isinstance(weight, fx.Node) else None
        channels = sizes(mean) if isinstance(mean, fx.Node) else None
        if shape is None or channels is None or shape[0] != channels[0]:
            continue
        if layer.target is LINEAR and len(sizes(layer) or ()) != 2 + int(str(node.args[6])):
            continue  # channels are the second axis of its output, not the last
        with graph.inserting_before(layer):
            scale = graph.call_function(_scale, (variance, gain, eps))
            folded = graph.call_function(_folded_weight, (weight, scale))
            moved = graph.call_function(_folded_bias, (bias, mean, scale, shift))
        folded.meta["val"], moved.meta["val"] = weight.meta["val"], mean.meta["val"]  # type: ignore[union-attr]
        scale.meta["val"] = moved.meta["val"]
        layer.args = (layer.args[0], folded, moved, *layer.args[3:])
        layer.meta["val"] = node.meta["val"]
        replace(node, layer)


def unfolded(weight: Any, bias: Any) -> tuple[Any, ...]:
    """Gives a layer's own weight and bias, and mean, variance, gain, shift and eps of the norm folded into them."""
    if not isinstance(bias, fx.Node) or bias.target is not _folded_bias:
        return weight, bias, None, None, None, None, 0.0
    own, mean, scale, shift = bias.args
    variance, gain, eps = scale.args  # type: ignore[union-attr]
    return weight.args[0], own, mean, variance, gain, shift, eps


def _folded_weight(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)


def _folded_bias(bias: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    moved = (-mean if bias is None else bias - mean) * scale
    return moved if shift is None else moved + shift


def _scale(variance: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(variance + eps)
    return scale if gain is None else scale * gain


def channels_last(graph: fx.Graph, *, few_digits: bool) -> None:
    """Puts channels last in the weights of convolutions over images; what follows takes the layout over.

    On a GPU with ``few_digits`` alone, as in tf32, and in half precision: with all of them cudnn takes twice as long.
    """
    done: dict[fx.Node, fx.Node] = {}
    for node in [*graph.nodes]:
        weight = node.args[1] if node.target is CONV else None
        if not isinstance(weight, fx.Node) or len(sizes(weight) or ()) != 4:
            continue
        value = weight.meta["val"]
        if few_digits or value.device.type == "cpu" or value.dtype in (torch.bfloat16, torch.float16):
            if weight not in done:
                with graph.inserting_before(node):
                    done[weight] = graph.call_function(channels_put_last, (weight,))
                done[weight].meta["val"] = weight.meta["val"]
            node.args = (node.args[0], done[weight], *node.args[2:])


def split_linear(graph: fx.Graph, passes: fx.Node, symbols: dict[Any, str], *, fused: bool) -> None:
    """Writes float32 linear layers on a CPU as products of matrices: a third faster where they are small.

    With AVX-512 the bias is added in place afterwards, which is 5 to 10 % faster at 100 units; with AVX2 it is part of
    the product, up to 18 % faster. Where layers are ``fused``, those of few units are one operation: see ``narrow``.
    """
    for node in [*graph.nodes]:
        value = node.meta.get("val")
        if node.target is not LINEAR or value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        x, weight, bias = node.args
        axes = [passes if symbols.get(size) == "T" else size for size in (sizes(x) or ())]
        *lead, units = (size if isinstance(size, int | fx.Node) else -1 for size in axes)
        if lead.count(-1) > 1:  # what a reshape cannot tell by itself
            continue
        with graph.inserting_before(node):
            turned = graph.call_function(aten.t.default, (weight,))
            flat = x if len(lead) == 1 else graph.call_function(aten.view.default, (x, [-1, units]))
            if fused and value.shape[-1] in NARROW and available(value.dtype, value.device):
                output = graph.call_function(narrow, (flat, turned, bias))
            elif bias is None or _WIDE:
                output = graph.call_function(aten.mm.default, (flat, turned))
                output = output if bias is None else graph.call_function(aten.add_.Tensor, (output, bias))
            else:
                output = graph.call_function(aten.addmm.default, (bias, flat, turned))
            if len(lead) > 1:
                output = graph.call_function(aten.view.default, (output, [*lead, value.shape[-1]]))
        output.meta = dict(node.meta)
        replace(node, output)


REWRITES: tuple[Callable[[fx.Graph], None], ...] = (drop_copies, scale_masks, fold_norms)


# -- within a stage ---------------------------------------------------------------------------------------------------


def write_in_place(graph: fx.Graph) -> None:
    """Lets elementwise operations write over an input that nothing reads after them: no fresh memory to fault in."""
    kept = {node for end in graph.nodes if end.op == "output" for node in end.all_input_nodes}
    turn = {node: place for place, node in enumerate(graph.nodes)}
    for node in [node for node in graph.nodes if _in_place(node.target)]:
        for index in (0, 1) if node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs else (0,):
            source = node.args[index] if index < len(node.args) else None
            if not isinstance(source, fx.Node) or source in kept or not alike(source, node):
                continue
            rest = [argument for place, argument in enumerate(node.args) if place != index]
            twice = source in rest and node.target in IN_PLACE  # a convolution reads more of it than where it writes
            others = [reader for reader in source.users if reader is not node]
            done = all(turn[one] < turn[node] and not is_view(one) and one.target not in _HOLD for one in others)
            if not twice and _owned(source) and done:
                node.target, node.args = _in_place(node.target), (source, *rest)
                break


def _in_place(target: Any) -> Any:
    """The operation that writes over its first argument, where an elementwise one has such a twin."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return IN_PLACE.get(target)
    packet = getattr(aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def alike(source: fx.Node, node: fx.Node) -> bool:
    """Whether two nodes give tensors of one shape and type."""
    old, new = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype == new.dtype and sizes(source) == sizes(node)
    )


def is_view(node: fx.Node) -> bool:
    """Whether a node looks at the memory of its first argument in another way, or may, where a copy was taken out."""
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    looks = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return looks or node.target is aten._unsafe_view.default


def _owned(node: fx.Node) -> bool:
    """Whether a node's memory is its own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in (*RUN, *ONEDNN, active_linear, after_conv, masked, summed)
    if is_view(node):
        source = node.args[0] if node.args else None
        # a view that covers all of what it looks at; an expanded one would be written several times over
        whole = node.target in (aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
        written = node.target._schema.is_mutable
        return (whole or written) and isinstance(source, fx.Node) and len(source.users) == 1 and _owned(source)
    return True


# What Python calls fastest; the rest goes through torch's table of overloads.
_FAST: dict[Any, Callable[..., Any]] = {
    aten.view.default: Tensor.reshape,  # a layout that differs from the stand-ins' must not fail
    aten._unsafe_view.default: Tensor.reshape,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.permute.default: Tensor.permute,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.sigmoid.default: torch.sigmoid,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.sub.Tensor: torch.sub,
    aten.t.default: Tensor.t,
    aten.tanh.default: torch.tanh,
    aten.tanh_.default: torch.tanh_,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    **RUN,
}
_PRODUCTS = {aten.mul.Tensor: times, aten.mul_.Tensor: times_}


def lower(graph: fx.Graph, *, fused: bool) -> None:
    """Puts what is called in the place of what was written down.

    Where torch's compiler fuses, it calls recurrent layers as they are, since those that it writes come out wrong, and
    what runs pass by pass, since it would write out every pass.
    """
    for node in graph.nodes:
        if _scales_mask(node):
            node.target, node.args = factors, (*node.args, node.meta["val"].dtype)
        elif fused and node.target in _PRODUCTS and _of_images(node):
            node.target = _PRODUCTS[node.target]
        elif node.op == "call_function" and (fused or node.target not in (EACH_PASS, RECURRENT)):
            node.target = _FAST.get(node.target, node.target)


def _of_images(node: fx.Node) -> bool:
    """Whether a product may be one of images (..., C, H, W), and a mask of all their units, on a CPU."""
    one, other = (sizes(given) or () if isinstance(given, fx.Node) else () for given in node.args)
    return min(len(one), len(other)) > 3 and one[-3:] == other[-3:] and node.meta["val"].device.type == "cpu"


def _scales_mask(node: fx.Node) -> bool:
    source = node.args[0] if node.target is aten.mul.Tensor else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.bool and isinstance(node.args[1], float)
