"""A torch network as an ONNX graph that still has its draws: one Dropout or random operator for each site, in order.

torch's own exporter loses the dropout of attention, of recurrent layers and of everything in eval mode. Here the live
shadow is exported under our interception, so that the graph draws where the network does, and nowhere else.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ModelRefused
from mcdrop.forward import forward, to_tensors
from mcdrop.intercept import Given, Interception
from mcdrop.onnx_draws import PATHS
from mcdrop.onnx_graph import walk
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.trace import Trace, repeat_rows, trace

__all__ = ["stochastic_graph"]

_OPSET = 20
_ROWS = 3


@torch.library.custom_op("mcdrop::dropout", mutates_args=())
def _dropout(x: Tensor, p: float) -> Tensor:
    """Stands for a Dropout node while a network is exported."""
    return x.clone()


@_dropout.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


class _Nodes(Given):
    """A source whose values are random operators of the graph."""

    def __init__(self, found: Trace, off: frozenset[str]) -> None:
        super().__init__([], found.layouts, found.forced)
        self._sites, self._left_off = found.sites, off

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Draws as the graph will."""
        if self.is_off():
            return None
        if kind == "uniform":
            return torch.rand(shape)
        if kind == "normal":
            return torch.randn(shape)
        return dropped(torch.ones(shape), p) * (1 - p)

    def is_off(self) -> bool:
        """Counts the draws, and says whether the next one was switched off by the user."""
        index, self._next = self._next, self._next + 1
        return self._sites[index].name in self._left_off


class _Exporting(Interception):
    """Dropout becomes one node, whatever function asked for it."""

    source: _Nodes

    def drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Inverted dropout of the first ``leading`` axes."""
        if self.source.is_off():
            return x
        if leading is None or leading == x.dim():
            return dropped(x, p)
        keep = dropped(torch.ones(x.shape[:leading], dtype=x.dtype), p)
        return x * keep.reshape(*x.shape[:leading], *(1,) * (x.dim() - leading))


def dropped(x: Tensor, p: float) -> Tensor:
    """Gives what a Dropout node gives."""
    node: Tensor = torch.ops.mcdrop.dropout(x, float(p))
    return node


class _Pass(nn.Module):
    """One stochastic pass as a module that can be exported."""

    def __init__(self, backend: TorchBackend, found: Trace, rows: Rows) -> None:
        super().__init__()
        self.live = backend.live
        self._backend, self._found, self._rows = backend, found, rows

    def forward(self, *leaves: Tensor) -> Tensor:
        """Runs the pass on the leaves of a batch of rows."""
        left = iter(leaves)
        rows = Rows(tuple(next(left) for _ in self._rows.args), {name: next(left) for name in self._rows.kwargs}, 0)
        with _Exporting(_Nodes(self._found, self._backend.off), RULES):
            return forward(self.live, rows, self._backend.pick)


def stochastic_graph(backend: TorchBackend, rows: Rows, names: Sequence[str], output: str) -> Any:
    """Gives an ONNX model whose every draw is a random operator, with any number of rows.

    Raises:
        ModelRefused: the network's draws, or the network, cannot be written as such a graph.
    """
    import onnxscript

    operators = getattr(onnxscript, f"opset{_OPSET}")

    seeds = itertools.count(1)

    def dropout_node(x: Any, p: float) -> Any:
        # told apart by a seed, or the exporter takes equal nodes for one
        return operators.Dropout(x, p, True, seed=next(seeds))[0]

    few = to_tensors(repeat_rows(rows, _ROWS), backend.live)
    found = trace(backend.live, few, backend.pick, backend.force)
    if found.rates or found.unclear:
        raise ModelRefused(
            "a draw whose rate, or whose rows, are only known while it runs cannot be written to a graph"
        )
    leaves = tuple(leaf for _, leaf in few.named())
    count = torch.export.Dim("rows", min=1)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Pass(backend, found, few), leaves, dynamo=True, opset_version=_OPSET, verbose=False,
                input_names=list(names), output_names=[output],
                dynamic_shapes=(tuple({0: count} for _ in leaves),),
                custom_translation_table={torch.ops.mcdrop.dropout.default: dropout_node},
            )  # fmt: skip
        except Exception as error:  # whatever an exporter makes of somebody's network
            raise ModelRefused(f"torch cannot export this network to ONNX: {_reason(error)}") from error
    assert program is not None
    model = _without_seeds(program.model_proto)
    entry = model.metadata_props.add()
    entry.key, entry.value = PATHS, json.dumps([site.path for site in found.sites if site.name not in backend.off])
    return model


def _without_seeds(model: Any) -> Any:
    for place in walk(model.graph):
        if place.operator == "Dropout":
            del place.node.attribute[:]
    return model


def _reason(error: BaseException) -> str:
    """The first cause, where exporters tell what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's reports about itself away from users."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
