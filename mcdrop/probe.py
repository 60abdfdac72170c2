"""The differential probe: what does switching on the training flag of one module do?

No list of layer types: one flag at a time, on a shadow, and only flags whose effect is "draws random numbers and
nothing else" are kept. (Those that nobody but torch's own dropout layers reads are known to be such.) BatchNorm, moving
averages, losses and auxiliary heads of training stay in eval.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree

from mcdrop.agreement import identical
from mcdrop.forward import out_of_memory
from mcdrop.record import record
from mcdrop.rows import Rows
from mcdrop.shadow import takes_masks

__all__ = ["Verdict", "probe"]

_SEEDS = (1, 2)


@dataclass(frozen=True)
class Verdict:
    """What a module's training flag does, in words.

    ``kind`` is "stochastic" (draws and nothing else), "inert" (no effect on this input), "norm" or "refused"; ``draws``
    counts the random draws that the flag switches on.
    """

    kind: str
    reason: str
    draws: int = 0


@contextmanager
def _noting_readers(module: nn.Module) -> Iterator[dict[int, list[bool]]]:
    """Collects whose ``training`` is read, by id, and of each time whether by itself.

    It changes classes of the shadow for the while.
    """
    readers: dict[int, list[bool]] = {}

    def read(self: nn.Module) -> bool:
        readers.setdefault(id(self), []).append(sys._getframe(1).f_locals.get("self") is self)
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


def probe(module: nn.Module, rows: Rows) -> dict[str, Verdict]:
    """Gives for each module that reads its training flag what switching it on does; all flags are off at the end."""
    with _noting_readers(module) as readers:
        base = _observe(module, rows, seed=_SEEDS[0])
    verdicts = {}
    for path, child in module.named_modules():
        if id(child) not in readers:
            continue
        if isinstance(child, _NormBase):
            verdicts[path] = Verdict("norm", "a norm layer: its running statistics stay frozen")
            continue
        if _only_drops(child, by_itself=all(readers[id(child)])):
            verdicts[path] = Verdict("stochastic", "draws random numbers", len(readers[id(child)]))
            continue
        child.training = True
        try:
            verdicts[path] = _effect(module, rows, base)
        finally:
            child.training = False
    return verdicts


def _only_drops(layer: nn.Module, *, by_itself: bool) -> bool:
    """Whether a flag is read by nothing but one of torch's dropout layers, whose code says what it does."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return takes_masks(layer) and by_itself and not hooked and 0 <= float(layer.p) <= 1  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Observation:
    draws: int
    structure: tuple[Any, ...]
    values: list[Tensor]
    written: frozenset[str]
    changed: frozenset[tuple[str, str]]  # attributes, as (module, name)


def _observe(module: nn.Module, rows: Rows, *, seed: int) -> _Observation:
    before, raw = _attributes(module), []
    kept = [(child, dict(child.__dict__)) for child in module.modules()]

    def keep(result: Any) -> Tensor:
        raw.append(result)
        return next(leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor))

    source, spy = record(module, rows, keep, seed=seed)
    leaves, spec = _pytree.tree_flatten(raw[0])
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    structure = (str(spec), *((tuple(value.shape), value.dtype) for value in values))
    changed = frozenset(key for key, value in _attributes(module).items() if before.get(key) != value)
    for child, attributes in kept:  # counters and the like, on the shadow: the passes start where the user's module is
        child.__dict__.clear()
        child.__dict__.update(attributes)
    draws = len(source.draws) + len(spy.escaped)
    return _Observation(draws, structure, values, frozenset(spy.written), changed)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain values that modules keep about themselves, such as step counters."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def _effect(module: nn.Module, rows: Rows, base: _Observation) -> Verdict:
    """Says what the flag that was just switched on does; a second look is for what the first does not settle."""
    try:
        first = _observe(module, rows, seed=_SEEDS[0])
        altered = _altered(first, base)
        if first.draws > base.draws and first.structure == base.structure and not altered:
            return Verdict("stochastic", "draws random numbers", first.draws - base.draws)
        second = _observe(module, rows, seed=_SEEDS[1])
    except Exception as error:  # any failure but of memory means that this is not a flag to switch on
        if out_of_memory(error):
            raise
        return Verdict("refused", f"fails in training mode: {type(error).__name__}: {str(error)[:100]}")
    draws = max(first.draws, second.draws) - base.draws
    if altered:
        return Verdict("refused", altered, draws)
    if first.structure == second.structure != base.structure:  # else the shape of the output itself is random
        return Verdict("refused", "returns something else in training mode", draws)
    if {first.draws, second.draws} != {base.draws}:
        return Verdict("stochastic", "draws random numbers", draws)
    if all(identical(a, b) for a, b in zip(first.values, base.values, strict=True)):
        return Verdict("inert", "no effect on this input")
    if any(not identical(a, b) for a, b in zip(first.values, second.values, strict=True)):
        return Verdict("refused", "gives other numbers at each call, from a generator out of sight", 1)
    return Verdict("refused", "computes something else in training mode, without a draw")


def _altered(seen: _Observation, base: _Observation) -> str:
    """Says what a pass in training mode writes to or changes and one in eval does not; empty where there is nothing."""
    written, changed = seen.written - base.written, seen.changed - base.changed
    if written:
        return f"writes to {', '.join(sorted(written))} in training mode"
    return f"changes its attribute {min(changed)[1]} in training mode" if changed else ""
