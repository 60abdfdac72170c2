"""A torch network as an ONNX graph that still has its draws: one Dropout or random operator for each site.

torch's own exporter loses the dropout of attention, of recurrent layers and of everything in eval mode. Here the live
shadow is exported under our interception, so that the graph draws where the network does, and nowhere else.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import MissingExtra, ModelRefused
from mcdrop.forward import forward, to_tensors
from mcdrop.intercept import Given, Interception
from mcdrop.onnx_draws import DRAWS
from mcdrop.onnx_graph import walk
from mcdrop.onnx_slots import SITES
from mcdrop.quiet import quiet
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.trace import Trace, repeat_rows, trace

__all__ = ["stochastic_graph"]

_OPSET = 20
_ROWS = 3


@torch.library.custom_op("mcdrop::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, site: int) -> Tensor:
    """Stands for a Dropout node while a network is exported."""
    return x.clone()


@torch.library.custom_op("mcdrop::uniform", mutates_args=())
def _uniform(x: Tensor, site: int) -> Tensor:
    """Stands for a RandomUniformLike node."""
    return x.clone()


@torch.library.custom_op("mcdrop::normal", mutates_args=())
def _normal(x: Tensor, site: int) -> Tensor:
    """Stands for a RandomNormalLike node."""
    return x.clone()


for _operator in (_dropout, _uniform, _normal):
    _operator.register_fake(lambda x, *given: torch.empty_like(x))


class _Nodes(Given):
    """A source whose values are random operators of the graph."""

    def __init__(self, found: Trace, off: frozenset[str]) -> None:
        super().__init__([], found.layouts, found.forced)
        self._numbered, self._left_off = found.sites, off

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Draws as the graph will."""
        site = self.next_site()
        if site is None:
            return None
        ones = torch.ones(shape)
        if kind == "bernoulli":
            return _dropped(ones, p, site) * (1 - p)
        numbers: Tensor = getattr(torch.ops.mcdrop, kind)(ones, site)
        return numbers

    def next_site(self) -> int | None:
        """Gives the number of the next draw, None if it is left off."""
        index, self._next = self._next, self._next + 1
        return None if self._numbered[index].name in self._left_off else index


class _Exporting(Interception):
    """Dropout becomes one node, whatever function asked for it."""

    source: _Nodes

    def drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Inverted dropout of the first ``leading`` axes."""
        site = self.source.next_site()
        if site is None:
            return x
        if leading is None or leading == x.dim():
            return _dropped(x, p, site)
        keep = _dropped(torch.ones(x.shape[:leading], dtype=x.dtype), p, site)
        return x * keep.reshape(*x.shape[:leading], *(1,) * (x.dim() - leading))


def _dropped(x: Tensor, p: float, site: int) -> Tensor:
    node: Tensor = torch.ops.mcdrop.dropout(x, float(p), site)
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
        with _Exporting(_Nodes(self._found, self._found.left_off(self._backend.excluded)), RULES):
            return forward(self.live, rows, self._backend.pick)


def stochastic_graph(backend: TorchBackend, rows: Rows, names: Sequence[str], output: str) -> Any:
    """Gives an ONNX model whose every draw is a random operator, with any number of rows.

    Raises:
        ModelRefused: the network's draws, or the network, cannot be written as such a graph.
        MissingExtra: torch's exporter needs onnxscript.
    """
    few = to_tensors(repeat_rows(rows, _ROWS), backend.live)
    found = trace(backend.live, few, backend.pick, backend.force)
    if found.rates or found.unclear:
        raise ModelRefused("a draw whose rate or rows are only known while the network runs cannot be part of a graph")
    leaves = few.leaves
    count, translations = torch.export.Dim("rows", min=1), _translations()
    # the exporter computes what depends on constants alone, and takes the dropout of a weight for that
    optimize = all(layout is not None for layout in found.layouts)
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Pass(backend.apart(), found, few), leaves, dynamo=True, opset_version=_OPSET, verbose=False,
                optimize=optimize, input_names=list(names), output_names=[output],
                custom_translation_table=translations, dynamic_shapes=(tuple({0: count} for _ in leaves),),
            )  # fmt: skip
        except Exception as error:  # whatever an exporter makes of somebody's network
            raise ModelRefused(f"torch cannot export this network to ONNX: {_reason(error)}") from error
    assert program is not None
    return _with_sites(program.model_proto, found)


def _translations() -> dict[Any, Any]:
    """Our operators as nodes; the number of the site goes as a seed, which also keeps equal nodes from being merged."""
    try:
        import onnxscript
    except ImportError:
        raise MissingExtra("onnxscript", "onnx") from None
    operators = getattr(onnxscript, f"opset{_OPSET}")

    def dropout(x: Any, p: float, site: int) -> Any:
        return operators.Dropout(x, p, True, seed=site)[0]

    def uniform(x: Any, site: int) -> Any:
        return operators.RandomUniformLike(x, seed=float(site))

    def normal(x: Any, site: int) -> Any:
        return operators.RandomNormalLike(x, seed=float(site))

    ours = torch.ops.mcdrop
    return {ours.dropout.default: dropout, ours.uniform.default: uniform, ours.normal.default: normal}


def _with_sites(model: Any, found: Trace) -> Any:
    """Takes the seeds out again and writes down which site each random node is."""
    sites = []
    for place in walk(model.graph):
        for attribute in [one for one in place.node.attribute if one.name == "seed" and place.operator in DRAWS]:
            number = int(attribute.i if place.operator == "Dropout" else attribute.f)
            sites.append([number, found.sites[number].path])
            place.node.attribute.remove(attribute)
    entry = model.metadata_props.add()
    entry.key, entry.value = SITES, json.dumps(sites)
    return model


def _reason(error: BaseException) -> str:
    """The first cause, where exporters tell what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
