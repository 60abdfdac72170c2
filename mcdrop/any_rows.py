"""Programs that torch exported for one number of rows: what of it can be freed is, of the rest it is said how."""

from typing import Any

import torch
from torch import Tensor, nn

from mcdrop.errors import InputError
from mcdrop.forward import to_tensors
from mcdrop.quiet import quiet
from mcdrop.rows import Rows
from mcdrop.trace import repeat_rows

__all__ = ["RECURRENT", "fixed_rows", "states_of_any_rows"]

_aten = torch.ops.aten

RECURRENT: dict[Any, Any] = {
    _aten.gru.input: torch.gru,
    _aten.lstm.input: torch.lstm,
    _aten.rnn_relu.input: torch.rnn_relu,
    _aten.rnn_tanh.input: torch.rnn_tanh,
}
_ROWS_FIRST = 8  # the flag's position among the arguments of a recurrent layer
_BLANK = {_aten.new_zeros.default, _aten.zeros.default}
_ANY_ROWS = (
    "export it with dynamic_shapes=({0: torch.export.Dim('rows')},), one such entry for each input, and have the "
    "network read x.shape[0], not len(x), which fixes the rows"
)


def states_of_any_rows(graph: torch.fx.Graph, node: Any) -> Any:
    """Gives the first states of a recurrent layer, of which an export fixes the rows: blank ones for as many as come.

    Others are checked each time, since torch writes past their end where they are too few.
    """
    x, axis = node.args[0], 0 if node.args[_ROWS_FIRST] else 1

    def free(state: Any) -> Any:
        like = state.meta["val"]
        if not isinstance(like.shape[1], int):
            return state
        with graph.inserting_before(node):
            if not _is_blank(state):
                graph.call_function(_check_rows, (x, axis, state))
                return state
            rows = graph.call_method("size", (x, axis))
            shape = [like.shape[0], rows, like.shape[2]]
            return graph.call_function(_aten.zeros.default, (shape,), {"dtype": like.dtype, "device": like.device})

    return torch.fx.node.map_arg(node.args[1], free)


def _is_blank(state: Any) -> bool:
    while _is_copied(state):
        state = state.args[0]
    return state.target in _BLANK and _only_starts(state)


def _is_copied(state: Any) -> bool:
    return getattr(state.target, "overloadpacket", None) is _aten.to


def _only_starts(state: Any) -> bool:
    """Whether recurrent layers alone read a state, which do not write to it as others may."""
    recurrent = {*RECURRENT, *RECURRENT.values()}
    return all(user.target in recurrent or (_is_copied(user) and _only_starts(user)) for user in state.users)


def _check_rows(x: Tensor, axis: int, state: Tensor) -> None:
    if x.shape[axis] != state.shape[1]:
        raise InputError(
            f"a recurrent layer of the program starts from states for {state.shape[1]} rows and got {x.shape[axis]}; "
            "export it with dynamic_shapes"
        )


def fixed_rows(module: nn.Module, example: Any) -> str:
    """Says of a program that takes the number of rows that it was exported for, and fails with one more, that it does.

    Nothing is said of any other, or where the example is to blame.
    """
    inputs = (node for node in getattr(module, "graph", torch.fx.Graph()).nodes if node.op == "placeholder")
    shapes = [one.shape for node in inputs if isinstance(one := node.meta.get("val"), Tensor)]
    counts = sorted({shape[0] for shape in shapes if shape and isinstance(shape[0], int)})
    if not counts or not _takes(module, example, counts[0]) or _takes(module, example, counts[0] + 1):
        return ""
    return f"it was exported for {counts[0]} rows and takes no others; {_ANY_ROWS}"


def _takes(module: nn.Module, example: Any, count: int) -> bool:
    """Whether a network runs on so many of the rows."""
    try:
        rows = to_tensors(repeat_rows(Rows.of(example), count), module)
        with torch.random.fork_rng(), torch.no_grad(), quiet():
            # by forward, since a call of a graph's module prints what it fails with
            module.forward(*(leaf.clone() for leaf in rows.args), **rows.kwargs)
    except Exception:  # whatever a network makes of rows
        return False
    return True
