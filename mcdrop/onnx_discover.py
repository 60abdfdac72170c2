"""Discovery in an ONNX graph: its draws become inputs, each is proved live, and what was lost in export is named."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mcdrop.agreement import difference, identical
from mcdrop.audit import Audit, SiteReport
from mcdrop.backends.onnx import OnnxBackend
from mcdrop.errors import NoStochasticSite
from mcdrop.masks import Site, sample_masks
from mcdrop.moments import mean_gap, moments_of, total_variance
from mcdrop.onnx_draws import masks_as_inputs
from mcdrop.onnx_graph import depends_on, drop_norm_training, drop_own_inputs, drop_unread_inputs, read_graph, walk
from mcdrop.onnx_inputs import GraphInput, graph_inputs, made_up, picked, placed
from mcdrop.onnx_slots import Slot
from mcdrop.rows import Rows

__all__ = ["Discovery", "Graph", "discover_graph"]

_PASSES = 32
_FEWEST = 2
_DRAWN_BYTES = 2**28  # of all passes that a look takes
_TRIES = 6
_RECIPE = (
    "export the network again with the dropout layers in training mode and everything else in eval: model.eval(); "
    "[m.train() for m in model.modules() if 'Dropout' in type(m).__name__]; torch.onnx.export(model, ..., "
    "dynamo=True); or mcdrop.save(mcdrop.wrap(model, ...), folder, format='onnx'), which keeps attention and recurrent "
    "dropout too; or put dropout after named nodes with inject={'node': 0.1}"
)


@dataclass(frozen=True)
class Graph:
    """A graph as it was given: its bytes, the output that is read, and the drop rates put after nodes."""

    data: bytes
    output: str
    inject: dict[str, float]


@dataclass(frozen=True)
class Discovery:
    """A graph as it was given and ready to run, what it takes, the rows it was traced with, and the audit."""

    graph: Graph
    backend: OnnxBackend
    inputs: tuple[GraphInput, ...]
    rows: Rows
    audit: Audit


def discover_graph(
    source: "bytes | str | Path | onnx.ModelProto",
    rows: Rows | None,
    *,
    output: str | int | None = None,
    inject: Mapping[str, float] | None = None,
    digest: str | None = None,
) -> Discovery:
    """Turns every draw of a graph into an input and proves each live.

    Args:
        source: a path, the bytes of a file or a model; it is not changed.
        rows: example rows; None makes some up from the shapes of the inputs.
        output: name or position of the output to read; None is the only floating one.
        inject: drop rates by the names of nodes after which a dropout is put.
        digest: what names the weights; None is the sha256 of the graph.

    Raises:
        ArtifactError: it is no sound graph in one piece.
        NoStochasticSite: it has no live draw; the message says how to export it with its dropout.
        UncontrolledDraw: it draws what no mask can stand for.
        ModelRefused: the runtime does not take it, or it takes one number of rows only.
    """
    model = read_graph(source)
    data = model.SerializeToString(deterministic=True)
    digest = digest or hashlib.sha256(data).hexdigest()
    name = model.graph.name or "the graph"
    drop_own_inputs(model)
    norms = drop_norm_training(model)
    nodes = [*walk(model.graph)]
    layers = {place.path: place.node.output[0] for place in nodes if not place.chain and place.node.output}
    bare = _softmax_without_dropout(model)
    slots = masks_as_inputs(model, inject)
    if not slots:
        raise NoStochasticSite(
            f"{name} has no live stochastic site: every variance would be 0. Looked at {len(nodes)} nodes and found no "
            f"Dropout and no random operator, as in exports in eval mode, which drop them; {_RECIPE}"
        )
    if rows is None or len(rows.leaves) + len(slots) < len(model.graph.input):
        drop_unread_inputs(model)  # which may be given, but need not
    _free_rows(model, slots)
    backend = OnnxBackend(model, slots, picked(model, output), digest=digest, layers=layers)
    inputs = graph_inputs(backend.inputs)
    rows = made_up(inputs) if rows is None else placed(rows, inputs)
    audit = _audit(backend, rows, name, len(nodes))
    warnings = (*audit.warnings, *_lost(norms, [path for path in bare if path not in (inject or {})]))
    kept = dict.fromkeys(norms, "batch norm in training mode: put back to its running statistics")
    audit = replace(audit, kept=kept, warnings=warnings)
    if not audit.live:
        said = "; ".join(f"{site.path}: {site.reason}" for site in audit.sites)
        raise NoStochasticSite(f"{name} has no live stochastic site: every variance would be 0 ({said}); {_RECIPE}")
    return Discovery(Graph(data, backend.output, dict(inject or {})), backend, inputs, rows, audit)


def _lost(norms: list[str], bare: list[str]) -> list[str]:
    """What an export changed in the network that was trained, in words."""
    said = [f"batch norm {path} was exported in training mode; its running statistics are used" for path in norms]
    if bare:
        said.append(
            f"attention without dropout at {', '.join(bare)}: exporters lose it; if the network was trained with it, "
            f"load with inject={{{bare[0]!r}: p}} or save the network with mcdrop"
        )
    return said


# -- the graph ---------------------------------------------------------------------------------------------------------


def _free_rows(model: Any, slots: tuple[Slot, ...]) -> None:
    """Leaves the first axis of every input open; whether the graph can follow is seen when it is traced."""
    masks = {slot.mask for slot in slots}
    for info in model.graph.input:
        if info.name not in masks and info.type.tensor_type.shape.dim:
            info.type.tensor_type.shape.dim[0].Clear()
            info.type.tensor_type.shape.dim[0].dim_param = "mcdrop.rows"
    del model.graph.value_info[:]  # shapes that were inferred for another number of rows


def _softmax_without_dropout(model: Any) -> list[str]:
    """Names every softmax that goes straight into a matrix product, as attention does where dropout was lost."""
    graph, found = model.graph, []
    inputs = {info.name for info in graph.input} - {tensor.name for tensor in graph.initializer}
    moving = depends_on(graph, inputs)
    for place in walk(graph):
        if place.operator == "Softmax" and not place.chain:
            users = [node for node in graph.node if place.node.output[0] in node.input]
            into = [node for node in users if node.op_type == "MatMul" and node.input[0] == place.node.output[0]]
            if any(len(node.input) > 1 and node.input[1] in moving for node in into):
                found.append(place.path)
    return found


# -- proof -------------------------------------------------------------------------------------------------------------


def _audit(backend: OnnxBackend, rows: Rows, name: str, nodes: int) -> Audit:
    plan = backend.plan(rows)
    sites = plan.trace.sites
    shared = {
        site
        for slot in backend.slots
        if plan.trace.layouts[slot.mask] is None
        for site in plan.trace.of_slot[slot.mask]
    }
    one = sum(4 * math.prod(site.shape) for site in sites)
    passes = min(_PASSES, max(_FEWEST, _DRAWN_BYTES // max(one, 1)))
    drawn = sample_masks(sites, passes, seed=0)
    off = backend.deterministic(rows).astype(np.float64)
    everything = moments_of(backend.run(rows, drawn, passes, plan.trace, plan.tier))
    reports = []
    for site in sites:
        verdict, reason = _verdict(backend, rows, sites, site)
        share = None
        if verdict == "live":
            alone = backend.run(rows, {site.name: drawn[site.name]}, passes, plan.trace, plan.tier)
            share = total_variance(moments_of(alone)) / total_variance(everything)
        p = site.p if site.kind == "bernoulli" else None
        reports.append(
            SiteReport(
                site.name, site.path, site.kind, p, site.shape, verdict, reason, shared=site.name in shared, share=share
            )
        )
    return Audit(
        model=name, modules=nodes, sites=tuple(reports), stochastic=tuple(dict.fromkeys(site.path for site in sites)),
        tier=plan.tier, tier_reason=plan.reason, mean_gap=mean_gap(everything, off),
        warnings=_coupled(backend, rows, off),
    )  # fmt: skip


def _verdict(backend: OnnxBackend, rows: Rows, sites: tuple[Site, ...], site: Site) -> tuple[str, str]:
    """Checks whether a mask on one site alone changes the output."""
    trace = backend.plan(rows).trace
    if any(site.name in names for mask, names in trace.of_slot.items() if mask in trace.absent):
        return "idle", "its branch does not run on the example"
    if site.kind == "bernoulli" and site.p in (0.0, 1.0):
        return "idle", f"its drop rate is {site.p:g}"
    # half of the units whatever the rate, so that a rare drop is seen as well as a common one
    even = [Site(one.name, one.shape, 0.5, one.kind) if one is site else one for one in sites]
    for seed in range(_TRIES):
        drawn = sample_masks(even, 2, seed=seed, sampler="iid")
        still = {name: values if name == site.name else values[[0, 0]] for name, values in drawn.items()}
        # and with the others at their expectation: of many in a row, often no unit passes all
        for masks in (still, {site.name: drawn[site.name]}):
            if not identical(*backend.run(rows, masks, 2, trace, "loop")):
                return "live", "changes the output"
    return "idle", "no mask on it changes the output"


def _coupled(backend: OnnxBackend, rows: Rows, off: NDArray[np.float64]) -> tuple[str, ...]:
    """Warns where a row's answer depends on its neighbours even with the draws off."""
    alone = backend.deterministic(rows.take(slice(0, 1))).astype(np.float64)
    if difference(np.concatenate([alone, off[1:]]), off) <= 2e-3:
        return ()
    return ("a row's answer depends on the other rows of its batch, even with every draw off",)
