"""The last layer in closed form: no mask is drawn where the mean and variance over it are known.

Where the last draw is a dropout whose output goes through a linear layer to the network's output, the output given
all other masks is ``W (h * m) + b`` with independent ``m``. Its mean is ``W (h * E m) + b`` and its variance
``W^2 (h^2 * Var m)``: averaging them over the other masks (Rao-Blackwell) leaves mean and variance as they are and
takes that layer's share out of their Monte Carlo error.
"""

import operator
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from mcdrop.kernels import LINEAR
from mcdrop.masks import Site
from mcdrop.rewrites import sizes

__all__ = ["make_exact", "sources"]

_MULTIPLY = torch.ops.aten.mul.Tensor
_ARITHMETIC = (operator.add, operator.mul)  # of sizes
_SHAPED = tuple(
    getattr(torch.ops.aten, name).default for name in ("_to_copy", "_unsafe_view", "expand", "unsqueeze", "view")
)


def make_exact(graph: fx.Graph, masks: Sequence[fx.Node], sites: Sequence[Site], passes: fx.Node) -> bool:
    """Changes a graph so that it gives mean and variance over its last masks, side by side on the last axis.

    Says whether it could: the output must be a linear layer of something times what follows from one mask alone, which
    nothing else reads.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    layer = output.args[0][0]
    masked = layer.args[0] if layer.target is LINEAR else None
    if not isinstance(masked, fx.Node) or masked.target is not _MULTIPLY or len(masked.users) > 1:
        return False
    weight, bias = layer.args[1:3]
    if sources(weight) & set(masks) or (isinstance(bias, fx.Node) and sources(bias) & set(masks)):
        return False
    for index in (0, 1):
        factor, hidden = masked.args[index], masked.args[1 - index]
        if isinstance(factor, fx.Node) and isinstance(hidden, fx.Node):
            mask = _mask_of(factor, masks)
            if (
                mask is not None
                and mask not in sources(hidden)
                and _is_dropout(sites[masks.index(mask)], factor, weight)
            ):
                _write(graph, output, (layer, masked, hidden, factor, mask), sites[masks.index(mask)].p, passes)
                return True
    return False


def sources(*nodes: fx.Node) -> set[fx.Node]:
    """All that values follow from, themselves included."""
    seen: set[fx.Node] = set()
    left = [*nodes]
    while left:
        one = left.pop()
        if one not in seen:
            seen.add(one)
            left += one.all_input_nodes
    return seen


def _mask_of(factor: fx.Node, masks: Sequence[fx.Node]) -> fx.Node | None:
    """The only placeholder of masks that a factor follows from, where nothing but the factor follows from it."""
    chain = sources(factor)
    inputs = [node for node in chain if node.op == "placeholder"]
    drawn = [node for node in inputs if node in masks]
    if len(drawn) != 1 or any(node.meta.get("val") is not None and node not in drawn for node in inputs):
        return None
    (mask,) = drawn
    after = [node for node in chain if mask in sources(node)]
    inside = all(user in after for node in after if node is not factor for user in node.users)
    return mask if inside and len(factor.users) == 1 else None


def _is_dropout(site: Site, factor: fx.Node, weight: fx.Node) -> bool:
    """Whether each input of the layer has a unit of its own: units stay apart, and in their place on the last axis."""
    width = (sizes(weight) or (None,))[-1]
    if site.kind != "bernoulli" or not site.shape or site.shape[-1] != width:
        return False
    return all(_keeps_apart(node) for node in sources(factor) if node.all_input_nodes)


def _keeps_apart(node: fx.Node) -> bool:
    """Whether an operation on a mask works unit by unit and leaves the last axis as it is."""
    if node.target in _ARITHMETIC:
        return True
    after, before = sizes(node), sizes(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if not after or not before or after[-1] != before[-1]:
        return False
    alone = len([one for one in node.all_input_nodes if sizes(one) is not None]) == 1
    return node.target in _SHAPED or (alone and torch.Tag.pointwise in getattr(node.target, "tags", ()))


def _write(graph: fx.Graph, output: fx.Node, parts: tuple[fx.Node, ...], p: float, passes: fx.Node) -> None:
    layer, masked, hidden, factor, mask = parts
    chain = [node for node in graph.nodes if node in sources(factor) and mask in sources(node) and node is not mask]
    with graph.inserting_before(masked):
        ends = []
        for value in (torch.ones_like, torch.zeros_like):
            copies = {mask: graph.call_function(value, (mask,))}
            for node in chain:
                copies[node] = graph.node_copy(node, partial(_mapped, copies))
            ends.append(copies[factor])
        moments = graph.call_function(_moments, (*ends, p))
    with graph.inserting_before(output):
        both = graph.call_function(_closed_form, (hidden, moments, *layer.args[1:3], passes))
    output.args = ((both,),)


def _mapped(copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return copies.get(node, node)


def _moments(kept: Tensor, dropped: Tensor, p: float) -> Tensor:
    """Mean and variance of the factor of each unit, (2, 1, ...), from its two values: of 32 bits or more."""
    wide = torch.promote_types(kept.dtype, torch.float32)
    kept, dropped = kept.to(wide), dropped.to(wide)
    mean = (1 - p) * kept[:1] + p * dropped[:1]
    return torch.stack([mean, p * (1 - p) * (kept[:1] - dropped[:1]) ** 2])


def _closed_form(hidden: Tensor, moments: Tensor, weight: Tensor, bias: Tensor | None, passes: int) -> Tensor:
    """Mean and variance of the layer's output over the factor, side by side: (T, N, ..., 2 D).

    The mean is computed as passes are. Squares have the digits of the factor's moments: with 16 bits they would vanish
    or grow endless.
    """
    linear = torch.nn.functional.linear
    mean = linear((hidden * moments[0]).to(weight.dtype), weight, bias)
    hidden, weight = hidden.to(moments.dtype), weight.to(moments.dtype)
    variance = linear(hidden * hidden * moments[1], weight * weight)
    both = torch.cat([mean.to(moments.dtype), variance], dim=-1)
    return both.expand(passes, *both.shape[1:])  # the same in every pass where no other mask is left
