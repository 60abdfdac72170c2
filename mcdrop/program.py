"""A captured graph made ready to run: cut into stages, each run no oftener than what it reads changes.

``weights`` reads the weights alone and runs once a call, ``masks`` the masks alone, so that what it gives can be kept
with them, ``rows`` runs once for each block of rows, and ``passes`` runs once for each chunk of passes of a block.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mcdrop.capture import Captured, NotCaptured
from mcdrop.exact import make_exact, sources
from mcdrop.kept import make_kept
from mcdrop.masks import Site
from mcdrop.quiet import ALONE
from mcdrop.rewrites import REWRITES, lower, split_linear, write_in_place

__all__ = ["Program", "Values"]

Values = tuple[Any, ...]

_WEIGHTS, _MASKS, _ROWS = 1, 2, 4  # what a value depends on; with masks and anything else it differs from pass to pass
_ARITHMETIC = (operator.add, operator.mul)  # of sizes, which every stage does for itself
_ORDER = {"weights": (0, _WEIGHTS), "masks": (_MASKS,), "rows": (_ROWS, _ROWS | _WEIGHTS)}


class Program:
    """The passes of one input signature, from tensors to outputs (T, N, ...); safe to use from several threads.

    Raises:
        NotCaptured: the graph asks for a size that is not made of the numbers of rows and passes.
    """

    def __init__(
        self, captured: Captured, *, dtype: torch.dtype | None = None, exact: Sequence[Site] | None = None,
        kept: bool = False,
    ) -> None:  # fmt: skip
        """Takes a captured graph, and the type that weights and inputs are to be given in (None: their own).

        With ``exact``, the sites of its masks, outputs are mean and variance over the last mask, (T, N, ..., 2 D);
        with ``kept`` each pass computes with the units that it keeps.
        """
        self._captured = captured
        self.dtype = dtype
        self._facts = _facts(captured)
        self._held: dict[tuple[int, int], bool] = {}
        self._stages = _stages(captured, exact, kept)
        self.plain = self  # the same before it was compiled
        self.fewest_rows = 1  # that it was proved for

    def holds(self, passes: int, rows: int) -> bool:
        """Whether it stands for so many passes of so many rows of the network with weights like today's."""
        if rows < self.fewest_rows:
            return False
        if not self._captured.guards:
            return True
        key = (passes, rows)
        if key not in self._held:
            self._held[key] = self._captured.holds(passes, rows)
        return self._held[key]

    def fits(self) -> bool:
        """Whether today's weights are there, shaped, typed and shared as those that it was captured with."""
        return _facts(self._captured) == self._facts

    def weights(self) -> Values:
        """Gives what follows from the weights of today."""
        tensors = [tensor for one in self._captured.places if (tensor := one.now()) is not None]
        if self.dtype is not None:
            tensors = [t.to(self.dtype) if t.is_floating_point() else t for t in tensors]
        return self._run("weights", *tensors)

    def masks(self, stacks: Sequence[Tensor]) -> Values:
        """Gives what follows from the masks, one stack (T, ...) a draw."""
        return self._run("masks", *stacks, len(stacks[0]))

    def rows(self, weights: Values, leaves: Sequence[Tensor], count: int) -> Values:
        """Gives what comes before the first draw, for a block of rows."""
        if self.dtype is not None:
            leaves = [leaf.to(self.dtype) if leaf.is_floating_point() else leaf for leaf in leaves]
        return self._run("rows", *weights, *leaves, count)

    def passes(self, weights: Values, masks: Values, rows: Values, passes: int, count: int) -> Tensor:
        """Gives the outputs (T, N, ...)."""
        output: Tensor = self._run("passes", *weights, *masks, *rows, passes, count)[0]
        return output

    def compiled(self) -> "Program":
        """Gives the same with the costly stages compiled by torch, on a GPU as CUDA graphs.

        Raises:
            NotCaptured: torch cannot compile here.
        """
        other = copy.copy(self)
        mode = (
            "reduce-overhead"
            if any(fact[2].type == "cuda" for fact in self._facts if isinstance(fact, tuple))
            else None
        )
        compiled = {
            name: _alone(torch.compile(self._stages[name], fullgraph=True, dynamic=True, mode=mode))
            for name in ("rows", "passes")
        }
        other._stages = {**self._stages, **compiled}
        return other

    def _run(self, stage: str, *values: Any) -> Values:
        found: Values = self._stages[stage](*values)
        return found


def _alone(run: Callable[..., Values]) -> Callable[..., Values]:
    """A compiled function that no other thread traces beside: it refuses to run then, and may have to compile anew."""

    def guarded(*values: Any) -> Values:
        with ALONE:
            return run(*values)

    return guarded


def _facts(captured: Captured) -> list[Any]:
    """What a graph takes for granted of the weights: which are there, their shapes and types, and which are one."""
    tensors = [one.now() for one in captured.places]
    facts: list[Any] = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    seen = [id(tensor) for tensor in tensors if tensor is not None]
    return facts if len(set(seen)) == len(seen) else [*facts, [seen.index(one) for one in seen]]


def _stages(captured: Captured, exact: Sequence[Site] | None, kept: bool) -> dict[str, Callable[..., Values]]:
    """Rewrites the graph and cuts it."""
    graph = fx.Graph(captured.graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    (end,) = graph.graph_copy(captured.graph, copies)  # type: ignore[misc]
    output = graph.output((end,))
    passes, rows = _with_sizes(graph, captured.symbols)
    for rewrite in REWRITES:
        rewrite(graph)
    given = {"T": [passes], "N": [rows]}
    for name in ("weights", "leaves", "masks"):
        given[name] = [copies[node] for node in getattr(captured, name)]
    if exact is not None and not make_exact(graph, given["masks"], exact, passes):
        raise NotCaptured("its output is not a linear layer of dropout that is read by nothing else")
    if kept and not make_kept(graph, given["masks"]):
        raise NotCaptured("it has no linear layers between dropouts")
    graph.eliminate_dead_code()  # before anything is written in place, which counts as being used
    split_linear(graph, passes, captured.symbols)
    return _cut(graph, given, output)


def _cut(graph: fx.Graph, given: dict[str, list[fx.Node]], output: fx.Node) -> dict[str, Callable[..., Values]]:
    depends = _dependences(graph, given)
    home: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and node.target not in _ARITHMETIC:
            home[node] = next((name for name, kinds in _ORDER.items() if depends[node] in kinds), "passes")
    placed = {name: _members(graph, home, depends, name) for name in (*_ORDER, "passes")}
    ends: dict[str, list[fx.Node]] = {name: [] for name in placed}
    # inputs count to the stage that takes them, and may be read by later ones as they are
    for name, stage in (("weights", "weights"), ("leaves", "rows"), ("masks", "masks")):
        home |= dict.fromkeys(given[name], stage)
    for node, stage in home.items():
        if any(home.get(user, "passes") != stage for user in node.users):
            ends[stage].append(node)
    ends["passes"] = [output.args[0][0]]  # type: ignore[index, list-item]
    inputs = {
        "weights": given["weights"],
        "masks": [*given["masks"], *given["T"]],
        "rows": [*ends["weights"], *given["leaves"], *given["N"]],
        "passes": [*ends["weights"], *ends["masks"], *ends["rows"], *given["T"], *given["N"]],
    }
    return {name: _function(graph, inputs[name], placed[name], ends[name]) for name in placed}


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
    whole: fx.Graph, inputs: list[fx.Node], nodes: list[fx.Node], ends: list[fx.Node]
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
    lower(graph)
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
