"""Attention's turns of its axes taken out of a graph: torch's own code puts steps before rows and back for every layer.

Each turn is a copy of all values, since what comes next reads them in order; rows may as well stay where they are.
"""

from typing import Any

import torch
from torch import fx

from mcdrop.kernels import LINEAR
from mcdrop.rewrites import alone, replace, sizes

__all__ = ["straighten_heads"]

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def straighten_heads(graph: fx.Graph) -> None:
    """Lets layers before and after attention read rows in their own order, and splits heads without a copy."""
    for node in [*graph.nodes]:
        if node.target is LINEAR:
            _turn_after(node)
    for node in [*graph.nodes]:
        if node.target in _VIEWS:
            _split_at_once(node)
        elif node.target is aten.transpose.int:
            _turn_before(node)
    graph.eliminate_dead_code()


def _turn_after(layer: fx.Node) -> None:
    """Turns two axes after a linear layer instead of before it, where heads are split next: it sees neither."""
    turned = alone(layer.args[0], aten.transpose.int)
    if turned is None or any(user.target not in _VIEWS for user in layer.users):
        return
    count = len(sizes(turned) or ())
    first, second = sorted(int(axis) % count for axis in turned.args[1:])  # type: ignore[arg-type]
    if second == count - 1:
        return
    with layer.graph.inserting_before(layer):
        straight = layer.graph.call_function(LINEAR, (turned.args[0], *layer.args[1:]))
        output = layer.graph.call_function(aten.transpose.int, (straight, first, second))
    output.meta = dict(layer.meta)
    straight.meta = {**layer.meta, "val": layer.meta["val"].transpose(first, second)}
    replace(layer, output)


def _split_at_once(node: fx.Node) -> None:
    """Splits heads from rows before the turn that parts them from steps, not after it: (S, N H, D) to (N, H, S, D)."""
    turned = alone(node.args[0], aten.transpose.int)
    merged = alone(turned.args[0], *_VIEWS) if turned is not None else None
    whole, after = sizes(node) or (), sizes(merged.args[0]) if merged is not None else None  # type: ignore[arg-type]
    if turned is None or merged is None or after is None or len(whole) < 4:
        return
    lead, (rows, heads, steps, units) = whole[:-4], whole[-4:]
    if after != (*lead, steps, rows, heads * units) or sizes(merged) != (*lead, steps, rows * heads, units):
        return
    if sizes(turned) != (*lead, rows * heads, steps, units):
        return
    *first, n, h, s, d = _asked(node)
    place = len(lead)
    with node.graph.inserting_before(node):
        split = node.graph.call_function(aten.view.default, (merged.args[0], [*first, s, n, h, d]))
        order = [*range(place), place + 1, place + 2, place, place + 3]
        output = node.graph.call_function(aten.permute.default, (split, order))
    output.meta = dict(node.meta)
    split.meta = {**node.meta, "val": node.meta["val"].permute([*range(place), place + 2, place, place + 1, place + 3])}
    replace(node, output)


def _turn_before(node: fx.Node) -> None:
    """Turns heads (S, N, H, D) to rows before the layer that reads them, which are turned after it: (S N, H D)."""
    split = alone(node.args[0], *_VIEWS)
    layer = alone(split.args[0], LINEAR) if split is not None else None
    merged = alone(layer.args[0], *_VIEWS) if layer is not None else None
    source = merged.args[0] if merged is not None else None
    if split is None or layer is None or merged is None or not isinstance(source, fx.Node):
        return
    whole, before, given = sizes(split) or (), sizes(source) or (), sizes(merged) or ()
    if len(whole) < 3 or len(before) != len(whole) + 1:
        return
    lead, (steps, rows, _) = whole[:-3], whole[-3:]
    place = len(lead)
    axes = sorted(int(axis) % len(whole) for axis in node.args[1:])  # type: ignore[arg-type]
    inner = before[-2] * before[-1]
    if axes != [place, place + 1] or before[:-2] != whole[:-1] or given != (*lead, steps * rows, inner):
        return
    *first, s, n, _ = _asked(split)
    with node.graph.inserting_before(node):
        turned = node.graph.call_function(aten.transpose.int, (source, place, place + 1))
        flat = node.graph.call_function(aten.view.default, (turned, [*first, n, s, inner]))
        output = node.graph.call_function(LINEAR, (flat, *layer.args[1:]))
    turned.meta = {**source.meta, "val": source.meta["val"].transpose(place, place + 1)}
    flat.meta = {**source.meta, "val": turned.meta["val"].flatten(-2)}
    output.meta = dict(node.meta)
    replace(node, output)


def _asked(view: fx.Node) -> list[Any]:
    """The sizes that a view asks for."""
    asked: Any = view.args[1]
    return [*asked]
