"""Capture: the passes of one input signature as a graph of torch operations, without the network's Python.

The network runs once on stand-ins for tensors, batched over the passes, while every operation is written down. The
numbers of passes and of rows stay symbols, so one graph serves all; what the network's code decided from them is kept
as guards. Weights and buffers are inputs of the graph: later changes of them are seen. Tensors that are kept as plain
attributes, or in lists and dicts there, are inputs too: later writes to them are seen.
"""

import itertools
import logging
import math
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from mcdrop.kernel_rules import KERNEL_RULES
from mcdrop.outputs import Pick
from mcdrop.quiet import quiet
from mcdrop.record import draws
from mcdrop.rows import Rows
from mcdrop.standing import Standing, State, constants_of, holding, state_of
from mcdrop.trace import Trace, one_pass
from mcdrop.volatile import Left

__all__ = ["Captured", "NotCaptured", "capture"]

_PASSES, _ROWS = 5, 3  # of the stand-ins: unequal primes, so that no axis is taken for another
_TELLING = (31, 37, 41, 43, 47, 53, 59, 61)  # numbers of rows that are told from other sizes where they come as numbers
_MANY = 1_000_003  # another, for what a network decides by them

# Decisions about the layout in memory, which change no number; and what torch decides of its own stand-ins.
_HARMLESS = ("_subclasses/", "_prims_common/", "_prims/")


class NotCaptured(Exception):
    """A network whose passes cannot be written down as a graph; the message says why."""


class _ByValues(NotCaptured):
    """A network that decides by values."""


class _Tied(NotCaptured):
    """A network that takes the number of rows for a number, as by ``len(x)``."""


@dataclass(frozen=True)
class Captured:
    """A graph from (weights, inputs, masks) to the outputs (T, N, ...).

    ``weights``, ``leaves`` and ``masks`` are its placeholders, one weight for each that is ``standing``; ``symbols``
    maps each symbol to "T" or "N".
    """

    graph: fx.Graph
    weights: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    masks: tuple[fx.Node, ...]
    standing: Standing
    symbols: dict[Any, str]
    guards: tuple[Any, ...]

    @property
    def width(self) -> int:
        """How many numbers the output of a row has."""
        end = next(node for node in reversed(self.graph.nodes) if node.op == "output").all_input_nodes[0]
        return math.prod(size for size in end.meta["val"].shape[2:] if isinstance(size, int))

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph could hold it: all of it on one GPU, and no size that follows from values."""
        waits = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        if any(tag in getattr(node.target, "tags", ()) for node in self.graph.nodes for tag in waits):
            return False
        values = [node.meta.get("val") for node in self.graph.nodes]
        return [one.type for one in {value.device for value in values if isinstance(value, Tensor)}] == ["cuda"]

    def holds(self, passes: int, rows: int) -> bool:
        """Whether the network's own code would go the same way with so many passes and rows."""
        sizes = {symbol: passes if axis == "T" else rows for symbol, axis in self.symbols.items()}
        return all(bool(guard.subs(sizes)) for guard in self.guards)


@quiet(logging.ERROR)
def capture(
    module: nn.Module, rows: Rows, pick: Pick, found: Trace, masks: Sequence[Tensor | None], *,
    dtype: torch.dtype | None = None,
) -> Captured:  # fmt: skip
    """Writes down the passes of a module on rows like the given ones.

    Args:
        module: the live shadow.
        rows: tensors; their number is free.
        pick: reads the output.
        found: the module's draws.
        masks: one stack a draw (T, ...), or None for its expectation; their number of passes is free.
        dtype: the type that real weights and inputs are given in; None is their own.

    Raises:
        NotCaptured: the network decides by values, or does what no graph holds.
    """
    if found.unclear:
        raise NotCaptured("its draws depend on the batch")

    def written() -> Captured:
        try:
            return _captured(module, rows, pick, found, masks, dtype)
        except _Tied as error:
            sizes = {size for tensor in _own_tensors(module, rows, masks) for size in tensor.shape[1:]}
            counts = [count for count in _TELLING if all(size % count for size in sizes)][:2]
            if len(counts) < 2:
                raise error from None
            return _captured(module, rows, pick, found, masks, dtype, (*counts, _MANY))

    before = Left(module)  # stand-ins that stay in a hook are of no use to anybody
    try:
        return written()
    except _ByValues:
        # libraries that look into a mask to save work, such as transformers, do not where an exporter asks them
        with _compiling_state_context():
            return written()
    finally:
        before.put_back()


def _own_tensors(module: nn.Module, rows: Rows, masks: Sequence[Tensor | None]) -> list[Tensor]:
    """All that a forward begins with, the rows or the passes in front."""
    state = [tensor[None] for one in state_of(module) if (tensor := one.now()) is not None]
    return [*state, *rows.leaves, *(mask for mask in masks if mask is not None)]


def _captured(
    module: nn.Module, rows: Rows, pick: Pick, found: Trace, masks: Sequence[Tensor | None], dtype: torch.dtype | None,
    counts: Sequence[int] = (),
) -> Captured:  # fmt: skip
    """Writes it down; with ``counts`` for so many rows first, then for any: their multiples were numbers of rows."""
    places, beside, names = state_of(module), constants_of(module), [*rows.kwargs]
    own = [one for one in places if one.now() is not None]
    state = [*own, *beside]

    def passes(weights: list[Tensor], leaves: list[Tensor], stacks: list[Tensor]) -> Tensor:
        named, given = dict(zip(names, leaves[len(rows.args) :], strict=True)), tuple(leaves[: len(rows.args)])
        placed = Rows(given, named, _ROWS)

        def one(*each: Tensor) -> Tensor:
            left = iter(each)
            drawn = [None if mask is None else next(left) for mask in masks]
            return one_pass(module, placed, pick, found, drawn, rules=KERNEL_RULES)

        with holding(module, state, weights):
            output: Tensor = torch.vmap(one)(*stacks)
            return output

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    mode.cache_enabled = False  # of what operations give: each is met once, and keeping them takes half of the time
    arguments = (
        [_stand_in(mode, _typed(tensor, dtype)) for one in state if (tensor := one.now()) is not None],
        [_stand_in(mode, _typed(leaf, dtype), _ROWS) for leaf in rows.leaves],
        [_stand_in(mode, stack, _PASSES) for stack in masks if stack is not None],
    )
    graph = _for_any(passes, arguments, mode, counts)
    symbols = _symbols(env, *arguments[1:])
    placeholders = iter(node for node in graph.nodes if node.op == "placeholder")
    weights, leaves, stacks = (tuple(next(placeholders) for _ in given) for given in arguments)
    beside, read = _read(graph, beside, weights[len(own) :])
    standing, weights = Standing([*places, *beside]), (*weights[: len(own)], *read)
    return Captured(graph, weights, leaves, stacks, standing, symbols, _guards(env, symbols))


def _for_any(
    passes: Callable[..., Tensor], arguments: tuple[list[Tensor], ...], mode: FakeTensorMode, counts: Sequence[int]
) -> fx.Graph:
    """Writes passes down for any number of rows; all ``counts`` must give the same, the last of them without a loop."""
    if not counts:
        return _written_down(passes, arguments, mode)
    (weights, leaves, stacks), code = arguments, ""
    for count in counts:
        with mode:
            tied = [leaf.new_empty((count, *leaf.shape[1:])) for leaf in leaves]
        untied = _untied(_written_down(passes, (weights, tied, stacks), mode), len(weights), count)
        if code not in ("", untied.module.code):
            raise NotCaptured("it goes another way for other numbers of rows")
        code = str(untied.module.code)
    return _written_down(lambda *given: untied.run(*itertools.chain(*given)), arguments, mode)


def _symbols(env: ShapeEnv, leaves: Sequence[Tensor], stacks: Sequence[Tensor]) -> dict[Any, str]:
    """The symbols of the numbers of rows and passes."""
    axes = [("N", leaf) for leaf in leaves] + [("T", stack) for stack in stacks]
    symbols = {env.replace(_expression(tensor.shape[0])): axis for axis, tensor in axes}
    tied = [axis for symbol, axis in symbols.items() if not symbol.is_symbol]
    if tied:
        raise (_Tied if tied == ["N"] else NotCaptured)("its operations are tied to the number of rows or passes")
    return symbols


def _untied(graph: fx.Graph, place: int, count: int) -> fx.Interpreter:
    """Makes multiples of a number of rows in a graph follow the rows of the placeholder in a place."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        rows = graph.call_function(torch.ops.aten.sym_size.int, (inputs[place], 0))

    for node in [*graph.nodes]:
        if node.op != "call_function" or node is rows:
            continue

        def follows(argument: Any, node: fx.Node = node) -> Any:
            if type(argument) is not int or not argument or argument % count:
                return argument
            with graph.inserting_before(node):
                return graph.call_function(operator.mul, (rows, argument // count))

        node.args, node.kwargs = (fx.node.map_aggregate(given, follows) for given in (node.args, node.kwargs))
    return fx.Interpreter(fx.GraphModule(graph.owning_module or nn.Module(), graph))


def _read(
    graph: fx.Graph, places: Sequence[State], nodes: Sequence[fx.Node]
) -> tuple[tuple[State, ...], tuple[fx.Node, ...]]:
    """Gives the places and inputs that a graph reads, and takes out the others."""
    read = {node: place for place, node in zip(places, nodes, strict=True) if node.users}
    for node in nodes:
        if node not in read:
            graph.erase_node(node)
    return tuple(read.values()), tuple(read)


def _typed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _stand_in(mode: FakeTensorMode, tensor: Tensor, count: int | None = None) -> Tensor:
    """A tensor without numbers, whose first axis is free where a number of entries is given for it."""
    tensor = tensor.detach() if count is None else tensor.new_empty((count, *tensor.shape[1:]))
    free = [DimDynamic.DYNAMIC if count and axis == 0 else DimDynamic.STATIC for axis in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=free))


def _written_down(
    function: Callable[..., Tensor], arguments: tuple[list[Tensor], ...], mode: FakeTensorMode
) -> fx.Graph:
    with torch.no_grad(), mode, _compiled_as_it_stands():
        # where torch only loops inside vmap, nothing is gained
        warnings.filterwarnings("error", message=".*performance drop.*")
        try:
            graph: fx.Graph = make_fx(torch.func.functionalize(function), tracing_mode="real")(*arguments).graph
        except Exception as error:  # whatever a network does that no graph can hold
            kind = _ByValues if isinstance(error, GuardOnDataDependentSymNode) else NotCaptured
            raise kind(" ".join(str(error).split())[:160] or type(error).__name__) from error
    graph.set_codegen(fx.graph.CodeGen())  # plain arguments instead of nested ones
    graph.eliminate_dead_code()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise NotCaptured(f"it writes to tensors by {node.target}")
        if draws(node.target, node.args, node.kwargs):
            raise NotCaptured(f"it draws by {node.target}")
    return graph


def _compiled_as_it_stands() -> AbstractContextManager[Any]:
    """Lets functions that the network compiled by ``torch.compile`` be written down, which torch refuses otherwise."""
    dynamo = sys.modules.get("torch._dynamo")  # not there: nothing is compiled, and loading it takes a second
    return nullcontext() if dynamo is None else dynamo.config.patch(error_on_nested_fx_trace=False)


def _expression(size: Any) -> Any:
    """The symbol that a free size stands for."""
    return size.node.expr


def _guards(env: ShapeEnv, symbols: dict[Any, str]) -> tuple[Any, ...]:
    """The conditions on the symbols under which the network goes this way."""
    kept = []
    for guard in env.guards:
        where = str(getattr(guard.sloc.framework_loc, "filename", ""))
        expression = env.replace(guard.expr)
        if any(part in where for part in _HARMLESS) or not expression.free_symbols:
            continue
        if not expression.free_symbols <= set(symbols):
            raise NotCaptured(f"its shapes depend on values ({expression})")
        kept.append(expression)
    return tuple(kept)
