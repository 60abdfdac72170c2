"""A captured graph cut into stages.

``weights`` looks at the weights alone and runs once a call, ``folded`` computes with them and runs when they have
changed, ``masks`` reads the masks alone, so that what it gives can be kept with them, ``rows`` runs once for each block
of rows, and ``passes`` runs once for each chunk of passes of a block.
"""

import ctypes
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mcdrop.capture import Captured, NotCaptured
from mcdrop.exact import make_exact, sources
from mcdrop.fuse import fuse
from mcdrop.heads import straighten_heads
from mcdrop.kept import leave_out_inactive, make_kept
from mcdrop.masks import Site
from mcdrop.rewrites import REWRITES, channels_last, is_view, lower, sizes, split_linear, write_in_place

__all__ = ["Stages", "Values", "make_stages"]

Values = tuple[Any, ...]

_COMPARE = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memcmp
_COMPARE.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_WEIGHTS, _MASKS, _ROWS = 1, 2, 4  # what a value depends on; with masks and anything else it differs from pass to pass
_ARITHMETIC = (operator.add, operator.mul)  # of sizes, which every stage does for itself
_ORDER = {"weights": (0, _WEIGHTS), "masks": (_MASKS,), "rows": (_ROWS, _ROWS | _WEIGHTS)}


@dataclass(frozen=True)
class Stages:
    """The stages of a graph, each a function of values.

    ``per_pass`` says which of the values that follow from masks have the passes as their first axis; ``only_looks``
    whether the stage of the weights gives nothing but their memory, so that what it gave shows their numbers of today.
    ``fixed`` has, for each stage and each value that it takes, the axes that are the same for all rows and passes.
    """

    run: dict[str, Callable[..., Values]]
    fixed: dict[str, list[list[int]]]
    per_pass: tuple[bool, ...]
    only_looks: bool


def make_stages(
    captured: Captured, exact: Sequence[Site] | None, *, kept: bool, fused: bool, few_digits: bool
) -> Stages:
    """Rewrites a graph and cuts it; the arguments are those of ``Program``.

    Raises:
        NotCaptured: a size is not made of the numbers of rows and passes, or what is asked for is not there.
    """
    graph = fx.Graph(captured.graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    (end,) = graph.graph_copy(captured.graph, copies)  # type: ignore[misc]
    output = graph.output((end,))
    passes, rows = _with_sizes(graph, captured.symbols)
    for rewrite in (*REWRITES, straighten_heads):
        rewrite(graph)
    given = {"T": [passes], "N": [rows]}
    for name in ("weights", "leaves", "masks"):
        given[name] = [copies[node] for node in getattr(captured, name)]
    if exact is not None and not make_exact(graph, given["masks"], exact, passes):
        raise NotCaptured("its output is not a linear layer of dropout that is read by nothing else")
    if kept and not make_kept(graph, given["masks"]):
        raise NotCaptured("it has no linear layers between dropouts")
    graph.eliminate_dead_code()  # before anything is written in place, which counts as being used
    if fused:
        leave_out_inactive(graph, given["masks"])
    split_linear(graph, passes, captured.symbols, fused=fused)
    if fused:  # else the compiler does both
        fuse(graph)
        channels_last(graph, few_digits=few_digits)
    symbols = {symbol for symbol, axis in captured.symbols.items() if axis == "T"}
    return _cut(graph, given, output, symbols, fused)


def _cut(graph: fx.Graph, given: dict[str, list[fx.Node]], output: fx.Node, passes: set[Any], fused: bool) -> Stages:
    depends = _dependences(graph, given)
    home: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and node.target not in _ARITHMETIC:
            home[node] = next((name for name, kinds in _ORDER.items() if depends[node] in kinds), "passes")
            mixed = _mixes(node, passes) or any(home.get(source) == "passes" for source in node.all_input_nodes)
            if home[node] == "masks" and mixed:  # else further passes could not be put behind it
                home[node] = "passes"
    home |= dict.fromkeys(_computed(graph, given["weights"], home), "folded")
    placed = {name: _members(graph, home, depends, name) for name in ("folded", *_ORDER, "passes")}
    ends: dict[str, list[fx.Node]] = {name: [] for name in placed}
    # inputs count to the stage that takes them, and may be read by later ones as they are
    for name, stage in (("weights", "weights"), ("leaves", "rows"), ("masks", "masks")):
        home |= dict.fromkeys(given[name], stage)
    for node, stage in home.items():
        later = {home.get(user, "passes") for user in node.users} - {stage}
        if later - {"folded"}:
            ends[stage].append(node)
    ends["passes"] = [output.args[0][0]]  # type: ignore[index, list-item]
    weights = [*ends["weights"], *ends["folded"]]
    inputs = {
        "folded": given["weights"],
        "weights": given["weights"],
        "masks": [*given["masks"], *given["T"]],
        "rows": [*weights, *given["leaves"], *given["N"]],
        "passes": [*weights, *ends["masks"], *ends["rows"], *given["T"], *given["N"]],
    }
    stages = {name: _function(graph, inputs[name], placed[name], ends[name], fused) for name in placed}
    read = [any(home.get(user) == "folded" for user in node.users) for node in given["weights"]]
    stages["folded"] = _Remembered(stages["folded"], [place for place, it in enumerate(read) if it])
    per_pass = tuple((sizes(node) or (None,))[0] in passes for node in ends["masks"])
    fixed = {name: [_fixed_axes(node) for node in given] for name, given in inputs.items()}
    return Stages(stages, fixed, per_pass, all(is_view(node) for node in placed["weights"]))


def _mixes(node: fx.Node, passes: set[Any]) -> bool:
    """Whether a value has its passes elsewhere than alone on its first axis, such as folded into another."""
    first, *others = sizes(node) or (1,)
    others = others if first in passes else [first, *others]
    return any(size.free_symbols & passes for size in others if not isinstance(size, int))


def _fixed_axes(node: fx.Node) -> list[int]:
    """The axes of a value whose sizes are numbers."""
    return [axis for axis, size in enumerate(sizes(node) or ()) if isinstance(size, int)]


def _computed(graph: fx.Graph, weights: list[fx.Node], home: dict[fx.Node, str]) -> list[fx.Node]:
    """Lists what computes with weights instead of looking at them another way, where the two can be told apart."""
    views, computed = {*weights}, []
    for node in graph.nodes:
        if home.get(node) == "weights":
            if is_view(node) and node.args[0] in views:
                views.add(node)
            else:
                computed.append(node)
    mixed = any(user in computed for node in views.difference(weights) for user in node.users)
    return [] if mixed else computed


def _members(graph: fx.Graph, home: dict[fx.Node, str], depends: dict[fx.Node, int], stage: str) -> list[fx.Node]:
    """The nodes of a stage: those at home there, and the sizes they need; the masks' own constants too."""
    own = [node for node, place in home.items() if place == stage]
    needed = sources(*own)
    shared = {
        node
        for node in needed
        if node.target in _ARITHMETIC or (stage == "masks" and depends[node] == 0 and node.op != "placeholder")
    }
    return [node for node in graph.nodes if home.get(node) == stage or node in shared]


def _dependences(graph: fx.Graph, given: dict[str, list[fx.Node]]) -> dict[fx.Node, int]:
    """Says of every value what it depends on; a number of rows counts as the rows, one of passes as the masks."""
    kinds = {"weights": _WEIGHTS, "leaves": _ROWS, "masks": _MASKS, "T": _MASKS, "N": _ROWS}
    depends = {node: kinds[name] for name, nodes in given.items() for node in nodes}
    for node in graph.nodes:
        if node not in depends:
            depends[node] = 0
            for source in node.all_input_nodes:
                depends[node] |= depends[source]
    return depends


def _function(
    whole: fx.Graph, inputs: list[fx.Node], nodes: list[fx.Node], ends: list[fx.Node], fused: bool
) -> Callable[..., Values]:
    """Makes a function of the given values out of some nodes of a graph."""
    root = whole.owning_module or nn.Module()
    graph = fx.Graph(whole.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(tuple(copies[node] for node in ends))
    write_in_place(graph)
    lower(graph, fused=fused)
    run: Callable[..., Values] = fx.GraphModule(root, graph).forward
    return run


def _with_sizes(graph: fx.Graph, symbols: dict[Any, str]) -> tuple[fx.Node, fx.Node]:
    """Adds the numbers of passes and rows as inputs, and lets every size be made of them."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        axes = {"T": graph.placeholder("passes_"), "N": graph.placeholder("rows_")}
    for node in [*graph.nodes]:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node.op == "call_function":
            with graph.inserting_before(node):
                size = _size(graph, value.node.expr, symbols, axes)
            for user in [*node.users]:
                swap = partial(_swapped, node, size)
                user.args, user.kwargs = fx.node.map_arg(user.args, swap), fx.node.map_arg(user.kwargs, swap)
            graph.erase_node(node)
    return axes["T"], axes["N"]


def _swapped(node: fx.Node, size: Any, old: fx.Node) -> Any:
    return size if old is node else old


def _size(graph: fx.Graph, expression: Any, symbols: dict[Any, str], axes: dict[str, fx.Node]) -> Any:
    """Writes a size as a node or a number: sums and products of whole numbers and the two symbols."""
    if expression.is_Integer:
        return int(expression)
    if expression in symbols:
        return axes[symbols[expression]]
    kinds = {"Add": "add", "Mul": "mul"}
    kind = kinds.get(type(expression).__name__)
    if kind is None:
        raise NotCaptured(f"a size is {expression}")
    first, *rest = (_size(graph, part, symbols, axes) for part in expression.args)
    for part in rest:
        first = graph.call_function(getattr(operator, kind), (first, part))
    return first


class _Remembered:
    """A function of tensors that runs anew when one that it reads holds other numbers than the last time.

    Comparing all numbers sees every write to a weight, and costs a tenth of folding it.
    """

    def __init__(self, run: Callable[..., Values], reads: Sequence[int]) -> None:
        """Takes the function and the places of the arguments that it reads."""
        self._run, self._reads = run, reads
        self._last: tuple[list[Tensor], Values] | None = None

    def __call__(self, *tensors: Tensor) -> Values:
        """Gives what the function gives."""
        if not self._reads or tensors[0].device.type != "cpu":  # where a comparison would wait for the device
            return self._run(*tensors)
        read, last = [tensors[place] for place in self._reads], self._last
        if last is not None and all(map(_same, last[0], read)):
            return last[1]
        made = self._run(*tensors)
        self._last = [tensor.detach().clone() for tensor in read], made
        return made


def _same(kept: Tensor, now: Tensor) -> bool:
    """Whether two tensors of one shape and type hold the same bits; five times as fast as torch compares numbers."""
    if not all(one.is_cpu and one.is_contiguous() and one.nbytes == kept.nbytes for one in (kept, now)):
        return torch.equal(kept, now)
    return not _COMPARE(kept.data_ptr(), now.data_ptr(), kept.nbytes)
