"""Products with fewer units: those that a pass keeps, or those that are not 0 before the first draw (``active``).

A pass computes with the kept units alone, where whole layers of them are dropped.

Between two dropouts a linear layer needs only the columns of the units kept before it and the rows of those kept after
it: with a rate of one half a quarter of the work. Gathering the weights costs the same for any number of rows, so it
pays for large batches; how large, a measurement tells (``plans``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mcdrop.active import Active, active_linear
from mcdrop.exact import sources
from mcdrop.kernels import LINEAR
from mcdrop.onednn import NARROW
from mcdrop.rewrites import replace, sizes

__all__ = ["leave_out_inactive", "make_kept"]

_MULTIPLY = torch.ops.aten.mul.Tensor
_LARGE = 2**16  # weights of a layer, below which finding inactive units takes as long as the product saves

Units = list[tuple[Tensor, Tensor]]  # for each pass the kept units and their factors
Function = Callable[[Tensor], Tensor]


@dataclass
class _Chain:
    """Linear layers one after another, each behind a dropout: what enters, and the nodes of each level."""

    hidden: fx.Node
    factors: list[fx.Node]
    layers: list[fx.Node]
    functions: list[tuple[Any, ...]]  # elementwise operations between a layer and the next dropout


def make_kept(graph: fx.Graph, masks: Sequence[fx.Node]) -> bool:
    """Lets chains of linear layers behind dropout use the kept units alone; says whether there are any."""
    taken: set[fx.Node] = set()
    found = False
    for layer in [*graph.nodes]:
        if layer in taken:
            continue
        chain = _chain_from(layer, set(masks))
        if chain is None or len(chain.layers) < 2:
            continue
        taken |= set(chain.layers)
        _write(graph, chain)
        found = True
    return found


def leave_out_inactive(graph: fx.Graph, masks: Sequence[fx.Node]) -> None:
    """Lets linear layers in float32 behind the first dropout leave out what is 0 in all rows, on a CPU."""
    for layer in [*graph.nodes]:
        value = layer.meta.get("val") if layer.target is LINEAR else None
        if value is None or value.dtype != torch.float32 or value.device.type != "cpu" or value.shape[-1] in NARROW:
            continue
        hidden, factor = _dropout(layer, set(masks)) or (None, None)
        if hidden is None or len(sizes(hidden) or ()) != 2 or sources(hidden) & set(masks):
            continue
        if layer.args[1].meta["val"].numel() < _LARGE:
            continue
        with graph.inserting_before(layer):
            active = graph.call_function(Active, (hidden, layer.args[1]))
            output = graph.call_function(active_linear, (active, factor, layer.args[2]))
        output.meta = dict(layer.meta)
        replace(layer, output)
    graph.eliminate_dead_code()


def _chain_from(layer: fx.Node, masks: set[fx.Node]) -> _Chain | None:
    """Follows linear layers as long as dropout and elementwise operations alone stand between them."""
    first = _dropout(layer, masks)
    if first is None:
        return None
    chain = _Chain(first[0], [first[1]], [layer], [])
    while True:
        functions, node = [], chain.layers[-1]
        while len(node.users) == 1 and _elementwise(user := next(iter(node.users))):
            functions.append((user.target, user.args[1:], dict(user.kwargs)))
            node = user
        masked = next(iter(node.users)) if len(node.users) == 1 else node
        layer = next(iter(masked.users)) if len(masked.users) == 1 else masked
        behind = _dropout(layer, masks) if layer.target is LINEAR and layer.args[0] is masked else None
        if behind is None or behind[0] is not node:
            return chain
        chain.factors.append(behind[1])
        chain.layers.append(layer)
        chain.functions.append(tuple(functions))


def _dropout(layer: fx.Node, masks: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Gives what a linear layer's dropout is given, and the factor of each unit (T, 1, F); None where there is none."""
    masked = layer.args[0] if layer.target is LINEAR else None
    if not isinstance(masked, fx.Node) or masked.target is not _MULTIPLY or len(masked.users) > 1:
        return None
    if any(isinstance(one, fx.Node) and sources(one) & masks for one in layer.args[1:3]):
        return None
    for hidden, factor in (masked.args, masked.args[::-1]):
        if isinstance(hidden, fx.Node) and isinstance(factor, fx.Node):
            inputs = {node for node in sources(factor) if node.op == "placeholder" and "val" in node.meta}
            shape, width = sizes(factor) or (), (sizes(layer.args[1]) or (0,))[-1]  # type: ignore[arg-type]
            if inputs and inputs <= masks and len(shape) == 3 and shape[1:] == (1, width):
                return (hidden, factor) if len(sizes(hidden) or ()) in (2, 3) else None
    return None


def _elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and len(node.all_input_nodes) == 1 and node.args[0] is node.all_input_nodes[0]


def _write(graph: fx.Graph, chain: _Chain) -> None:
    last = chain.layers[-1]
    with graph.inserting_before(last):
        units = [graph.call_function(_kept_units, (factor,)) for factor in chain.factors]
        weights = [layer.args[1] for layer in chain.layers]
        biases = [layer.args[2] for layer in chain.layers]
        output = graph.call_function(_run, (chain.hidden, units, weights, biases, tuple(chain.functions)))
    output.meta = dict(last.meta)
    last.replace_all_uses_with(output)
    graph.erase_node(last)


def _kept_units(factor: Tensor) -> Units:
    """The units of each pass whose factor is not 0, and their factors."""
    units = []
    for one in factor[:, 0]:
        index = one.nonzero()[:, 0]
        units.append((index, one[index]))
    return units


def _run(
    hidden: Tensor, units: list[Units], weights: list[Tensor], biases: list[Tensor | None],
    functions: tuple[tuple[Any, ...], ...],
) -> Tensor:  # fmt: skip
    """Runs the layers pass by pass on the kept units: (T, N, D)."""
    outputs = []
    for t, (index, factor) in enumerate(units[0]):
        x = (hidden[t] if hidden.dim() == 3 else hidden).index_select(1, index).mul_(factor)
        for level, between in enumerate(functions):
            after, factor = units[level + 1][t]
            weight = weights[level].index_select(0, after).index_select(1, index)
            bias = biases[level]
            x = torch.nn.functional.linear(x, weight, None if bias is None else bias.index_select(0, after))
            for function, rest, named in between:
                x = function(x, *rest, **named)
            x, index = x * factor, after
        x = torch.nn.functional.linear(x, weights[-1].index_select(1, index), biases[-1])
        outputs.append(x)
    return torch.stack(outputs)
