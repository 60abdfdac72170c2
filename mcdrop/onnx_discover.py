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

from mcdrop.agreement import difference, identical, largest
from mcdrop.audit import Audit, SiteReport
from mcdrop.backends.onnx import OnnxBackend
from mcdrop.errors import InputError, ModelRefused, NoStochasticSite
from mcdrop.masks import Site, sample_masks
from mcdrop.moments import mean_gap, moments_of, total_variance
from mcdrop.onnx_draws import drop_rates, masks_as_inputs
from mcdrop.onnx_graph import drop_norm_training, drop_own_inputs, drop_unread_inputs, walk
from mcdrop.onnx_inputs import GraphInput, graph_inputs, made_up, picked, placed
from mcdrop.onnx_lost import RECIPE, lost
from mcdrop.onnx_mixing import scaled_together
from mcdrop.onnx_read import read_graph
from mcdrop.onnx_slots import Slot
from mcdrop.rows import Rows
from mcdrop.telling import telling

__all__ = ["Discovery", "Graph", "discover_graph"]

_PASSES = 32
_FEWEST = 2
_DRAWN_BYTES = 2**28  # of all passes that a look takes
_TRIES = 6
_ALONE = 4  # rows from either end of the example
_APART = 2e-3


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
    inject = drop_rates(inject)
    changed = lost(model, norms, inject)
    slots = masks_as_inputs(model, inject)
    if not slots:
        raise NoStochasticSite(
            f"{name} has no live stochastic site: every variance would be 0. Looked at {len(nodes)} nodes and found no "
            "Dropout and no random operator, as in exports in eval mode and in graphs that onnxruntime's optimiser or "
            f"onnxslim wrote, which drop them: wrap the graph from before it, or {RECIPE}"
        )
    if rows is None or len(rows.leaves) + len(slots) < len(model.graph.input):
        drop_unread_inputs(model)  # which may be given, but need not
    exported = _free_rows(model, slots)
    backend = OnnxBackend(model, slots, picked(model, output), digest=digest, layers=layers, exported=exported)
    inputs = graph_inputs(backend.inputs)
    rows = made_up(inputs) if rows is None else placed(rows, inputs)
    audit = _audit(backend, rows, name, len(nodes))
    kept = dict.fromkeys(norms, "batch norm in training mode: put back to its running statistics")
    audit = replace(audit, kept=kept, warnings=(*audit.warnings, *changed))
    if not audit.live:
        said = "; ".join(f"{site.path}: {site.reason}" for site in audit.sites)
        raise NoStochasticSite(f"{name} has no live stochastic site: every variance would be 0 ({said}); {RECIPE}")
    return Discovery(Graph(data, backend.output, inject), backend, inputs, rows, audit)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _free_rows(model: Any, slots: tuple[Slot, ...]) -> int:
    """Leaves the first axis of every input open; whether the graph can follow is seen when it is traced.

    Gives how many rows it was exported for, 1 where its inputs do not say one number.
    Of the shapes that its exporter inferred, those are left that have the rows as their first axis and sizes as others.
    """
    masks, rows, counts = {slot.mask for slot in slots}, set[str](), set[int]()
    for info in model.graph.input:
        if info.name not in masks and info.type.tensor_type.shape.dim:
            rows.add(info.type.tensor_type.shape.dim[0].dim_param)
            counts.add(info.type.tensor_type.shape.dim[0].dim_value)
            info.type.tensor_type.shape.dim[0].Clear()
            info.type.tensor_type.shape.dim[0].dim_param = "mcdrop.rows"
    inferred = [(info, [*info.type.tensor_type.shape.dim]) for info in model.graph.value_info]
    kept = [
        info
        for info, (first, *others) in ((info, dims) for info, dims in inferred if dims)
        if first.dim_param in rows - {""} and all(dim.HasField("dim_value") for dim in others)
    ]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return max(counts.pop(), 1) if len(counts) == 1 else 1


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
        mean_preserving=None,
        warnings=_coupled(backend, rows, off),
    )  # fmt: skip


def _verdict(backend: OnnxBackend, rows: Rows, sites: tuple[Site, ...], site: Site) -> tuple[str, str]:
    """Checks whether a mask on one site alone changes the output."""
    trace = backend.plan(rows).trace
    if any(site.name in names for mask, names in trace.of_slot.items() if mask in trace.absent):
        return "idle", "its branch does not run on the example"
    if site.constant:
        return "idle", f"its drop rate is {site.p:.12g}: all passes have one mask"
    for seed in range(_TRIES):
        drawn = {**sample_masks(sites, 2, seed=seed), **telling([site], 2, seed=seed)}
        still = {name: values if name == site.name else values[[0, 0]] for name, values in drawn.items()}
        # and with the others at their expectation: of many in a row, often no unit passes all
        alone = {one.name: drawn[one.name] for one in sites if one.constant or one.name == site.name}
        for masks in (still, alone):
            if not identical(*backend.run(rows, masks, 2, trace, "loop")):
                return "live", "changes the output"
    return "idle", "no mask on it changes the output"


def _coupled(backend: OnnxBackend, rows: Rows, off: NDArray[np.float64]) -> tuple[str, ...]:
    """Warns where a row of the example answers otherwise when it is alone, with the draws off or with the same masks.

    Of many rows the first and the last are looked at. What scales rows together is told by its operators as well.
    """
    trace, so = backend.plan(rows).trace, "a row's answer depends on the other rows of its batch"
    drawn = sample_masks(trace.sites, 1, seed=0)
    together = backend.run(rows, drawn, 1, trace, "loop")[0]
    for row in sorted({*range(rows.count)[:_ALONE], *range(rows.count)[-_ALONE:]}):
        one, at = rows.take(slice(row, row + 1)), slice(row, row + 1)
        try:
            still, run = backend.deterministic(one), backend.run(one, drawn, 1, trace, "loop")[0]
        except (InputError, ModelRefused) as error:
            return (f"{so}: row {row} of the example takes a way of its own when it is alone ({error})",)
        if difference(still, off[at], scale=largest(off)) > _APART:
            return (f"{so}, even with every draw off: row {row} of the example alone is off",)
        if difference(run, together[at], scale=largest(together)) > _APART:
            return (f"{so}: with the same masks row {row} of the example alone is off",)
    scaling = scaled_together(backend.model)  # which few rows of a size do not show
    if scaling:
        return (
            f"{so}: {scaling[0]} scales the numbers of all rows by their largest; wrap the graph from before it was "
            "quantised, or quantise it with constant scales",
        )
    return ()
