"""Discovery: which parts of a network are random, proved by looking at what they do.

No list of layer types: a *differential probe* switches the training flag of one module at a time, on a shadow, and
keeps only the flags whose effect is "draws random numbers and nothing else". BatchNorm, moving averages, losses and
auxiliary heads of training stay in eval. Then every draw is traced, and a mask on it is shown to reach the output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree

from mcdrop.audit import Audit, SiteReport
from mcdrop.errors import InputError, ModelRefused, NoStochasticSite, UncontrolledDraw
from mcdrop.masks import Site, sample_masks
from mcdrop.outputs import Pick
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.trace import NoOverride, StateWrite, Trace, forward, one_pass, record, to_tensors, trace

__all__ = ["Discovery", "discover"]

_SEEDS = (1, 2, 3)
_FEW_ROWS = 4
_STOCHASTIC, _INERT = "draws random numbers", "no effect on this input"


@dataclass(frozen=True)
class Discovery:
    """A network's two shadows (draws on; all off), what is idle in it, and the audit."""

    live: nn.Module
    plain: nn.Module
    idle: frozenset[str]
    audit: Audit


def discover(module: nn.Module, rows: Rows, pick: Pick) -> Discovery:
    """Finds every random draw of the module's training behaviour and proves each one live.

    Raises:
        InputError: the module cannot take the rows.
        NoStochasticSite: no draw reaches the output.
        UncontrolledDraw: something draws random numbers that no mask controls.
    """
    name = type(module).__name__
    live, plain = live_shadow(module), live_shadow(module)
    few = to_tensors(rows.take(slice(0, _FEW_ROWS)), live)
    _try(plain, few, pick)
    own = _own_written_buffers(live, few, pick)
    verdicts = _probe(live, few)
    stochastic = tuple(path for path, verdict in verdicts.items() if verdict == _STOCHASTIC)
    by_path = dict(live.named_modules())
    for path in stochastic:
        by_path[path].training = True
    found = trace(live, few, pick)
    if found.escaped:
        raise UncontrolledDraw(_escaped_message(name, found))
    reports = _reports(live, few, pick, found)
    kept = {path: verdict for path, verdict in verdicts.items() if verdict not in (_STOCHASTIC, _INERT)}
    audit = Audit(
        model=name, modules=len(by_path), sites=reports, stochastic=stochastic, kept=kept,
        mean_preserving=_mean_preserving(live, plain, few, pick, found), warnings=(*own, *_warnings(found)),
    )  # fmt: skip
    if not audit.live:
        raise NoStochasticSite(_none_message(audit))
    return Discovery(live, plain, frozenset(r.name for r in reports if r.verdict != "live"), audit)


def _try(module: nn.Module, rows: Rows, pick: Pick) -> None:
    try:
        with torch.no_grad():
            output = forward(module, rows, pick)
    except InputError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in rows.named())
        raise InputError(f"the network cannot take these inputs ({shapes}): {error}") from error
    if output.shape[0] != rows.count:
        raise InputError(
            f"the picked output has {output.shape[0]} rows for {rows.count} rows of input; "
            "its first axis must be the rows"
        )


# -- the probe ---------------------------------------------------------------------------------------------------------


@contextmanager
def _noting_readers(module: nn.Module) -> Iterator[set[int]]:
    """Collects the ids of the modules that read ``self.training``; changes classes of the shadow for the while."""
    readers: set[int] = set()

    def read(self: nn.Module) -> bool:
        readers.add(id(self))
        return bool(self.__dict__["training"])

    def write(self: nn.Module, value: bool) -> None:
        self.__dict__["training"] = value

    children = list(module.modules())
    classes = [type(child) for child in children]
    for child, kind in zip(children, classes, strict=True):
        spied = {"training": property(read, write), "__module__": kind.__module__}
        child.__class__ = type(kind.__name__, (kind,), spied)
    try:
        yield readers
    finally:
        for child, kind in zip(children, classes, strict=True):
            child.__class__ = kind


def _probe(module: nn.Module, rows: Rows) -> dict[str, str]:
    """Gives for each module that reads its training flag what switching it on does."""
    with _noting_readers(module) as readers:
        base = _observe(module, rows, seed=_SEEDS[0])
    verdicts = {}
    for path, child in module.named_modules():
        if id(child) not in readers:
            continue
        if isinstance(child, _NormBase):
            verdicts[path] = "a norm layer: its running statistics stay frozen"
            continue
        child.training = True
        try:
            verdicts[path] = _effect(module, rows, base)
        finally:
            child.training = False
    return verdicts


@dataclass(frozen=True)
class _Observation:
    draws: int
    structure: tuple[Any, ...]
    values: list[Tensor]
    changed: frozenset[tuple[str, str]]  # attributes, as (module, name)


def _observe(module: nn.Module, rows: Rows, *, seed: int) -> _Observation:
    before, raw = _attributes(module), []

    def keep(result: Any) -> Tensor:
        raw.append(result)
        return next(leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor))

    _, draws, spy, foreign = record(module, rows, keep, seed=seed)
    leaves, spec = _pytree.tree_flatten(raw[0])
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    structure = (str(spec), *((tuple(value.shape), value.dtype) for value in values))
    changed = frozenset(key for key, value in _attributes(module).items() if before.get(key) != value)
    return _Observation(len(draws) + len(spy.escaped) + len(foreign), structure, values, changed)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain values that modules keep about themselves, such as step counters."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def _effect(module: nn.Module, rows: Rows, base: _Observation) -> str:
    """Says in words what the flag that was just switched on does; ``_STOCHASTIC`` if it draws and nothing else."""
    try:
        seen = [_observe(module, rows, seed=seed) for seed in _SEEDS]
    except StateWrite as write:
        return f"writes to {write.name} in training mode"
    except Exception as error:  # any failure means that this is not a flag to switch on
        return f"fails in training mode: {type(error).__name__}: {str(error)[:100]}"
    first = seen[0]
    if first.changed - base.changed:
        return f"changes its attribute {min(first.changed - base.changed)[1]} in training mode"
    if first.structure != base.structure:
        return "returns something else in training mode"
    if all(one.draws == base.draws for one in seen):
        same = all(torch.equal(a, b) for a, b in zip(first.values, base.values, strict=True))
        return _INERT if same else "computes something else in training mode, without a draw"
    return _STOCHASTIC


# -- proof -------------------------------------------------------------------------------------------------------------


def _own_written_buffers(live: nn.Module, rows: Rows, pick: Pick) -> tuple[str, ...]:
    """Gives the shadow its own copy of every buffer that the network writes to even in eval; says which."""
    own: list[str] = []
    while True:
        try:
            record(live, rows, pick, seed=0)
        except StateWrite as write:
            path, _, name = write.name.rpartition(".")
            owner = live.get_submodule(path)
            if write.name in own or name not in owner._buffers:
                raise ModelRefused(f"the network writes to its parameter {write.name} in eval mode") from None
            copies = {key: t.clone() if t is not None else None for key, t in owner._buffers.items()}
            owner.__dict__["_buffers"] = copies
            own.append(write.name)
        else:
            break
    return tuple(f"{name} is written to even in eval mode: mcdrop writes to a copy of its own" for name in own)


def _reports(live: nn.Module, rows: Rows, pick: Pick, found: Trace) -> tuple[SiteReport, ...]:
    """Checks site by site whether a mask on it alone changes the output."""
    reports = []
    with torch.no_grad():
        base = one_pass(live, rows, pick, found.layouts, [None] * len(found.sites))
        for index, site in enumerate(found.sites):
            verdict, reason = _verdict(live, rows, pick, found, index, base)
            p = site.p if site.kind == "bernoulli" else None
            shared = found.layouts[index] is None and site.name not in found.unclear
            reports.append(SiteReport(site.name, site.path, site.kind, p, site.shape, verdict, reason, shared))
    return tuple(reports)


def _verdict(live: nn.Module, rows: Rows, pick: Pick, found: Trace, index: int, base: Tensor) -> tuple[str, str]:
    site = found.sites[index]
    if site.kind == "bernoulli" and site.p in (0.0, 1.0):
        return "idle", f"its drop rate is {site.p:g}"
    # half of the units whatever the rate, so that a rare drop is seen as well as a common one
    probe = Site(site.name, site.shape, 0.5, site.kind)
    stack = torch.from_numpy(sample_masks([probe], 4, seed=0)[site.name]).to(base.device)
    for mask in stack:
        masks: list[Tensor | None] = [None] * len(found.sites)
        masks[index] = mask
        if not torch.equal(one_pass(live, rows, pick, found.layouts, masks), base):
            return "live", "changes the output"
    return "idle", "no mask on it changes the output"


def _mean_preserving(live: nn.Module, plain: nn.Module, rows: Rows, pick: Pick, found: Trace) -> bool:
    """Whether the network with every draw at its expectation equals plain eval."""
    with torch.no_grad():
        expected = one_pass(live, rows, pick, found.layouts, [None] * len(found.sites)).double()
        with NoOverride():
            eval_output = forward(plain, rows, pick).double()
    scale = max(float(eval_output.abs().max()), 1e-30)
    return float((expected - eval_output).abs().max()) <= 1e-4 * scale


# -- words -------------------------------------------------------------------------------------------------------------


def _warnings(found: Trace) -> tuple[str, ...]:
    return tuple(
        f"{name}: no axis of its draw could be told to follow the rows, so its numbers depend on the batch"
        for name in found.unclear
    )


def _escaped_message(name: str, found: Trace) -> str:
    places = sorted({f"{operation} in {path or 'the root module'}" for path, operation in found.escaped})
    return (
        f"{name} draws random numbers that no mask controls: {'; '.join(places)}. Its answers could not be repeated. "
        "Write the draw with torch.bernoulli, torch.rand, torch.randn or torch.nn.functional.dropout"
    )


def _none_message(audit: Audit) -> str:
    seen = "; ".join(f"{site.path or 'root'}: {site.kind}, {site.reason}" for site in audit.sites) or "no draw at all"
    kept = "".join(f"; {path or 'root'} {reason}" for path, reason in audit.kept.items())
    return (
        f"{audit.model} has no live stochastic site: every variance would be 0. Looked at {audit.modules} modules and "
        f"found: {seen}{kept}. Train it with dropout (torch.nn.Dropout with 0 < p < 1, or "
        "F.dropout(..., training=self.training)), or check that it was not stripped when the network was exported"
    )
