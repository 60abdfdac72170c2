"""The differential probe: what does switching on the training flag of one module do?

No list of layer types: one flag at a time, on a shadow, and only flags whose effect is "draws random numbers and
nothing else" are kept. (Those that nobody but torch's own dropout layers reads are known to be such.) BatchNorm, moving
averages, losses and auxiliary heads of training stay in eval.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree

from mcdrop.agreement import identical
from mcdrop.forward import out_of_memory
from mcdrop.record import Draw, record
from mcdrop.rows import Rows
from mcdrop.shadow import takes_masks

__all__ = ["Verdict", "probe"]

_SEEDS = (1, 2)
_LOOKS_UP = nn.Module.__getattr__.__code__

Readers = dict[int, list[bool]]


@dataclass(frozen=True)
class Verdict:
    """What a module's training flag does, in words.

    ``kind`` is "stochastic" (draws and nothing else), "inert" (no effect on this input), "norm" or "refused"; ``draws``
    counts the random draws that the flag switches on.
    """

    kind: str
    reason: str
    draws: int = 0


class _Flags(dict[str, Any]):
    """A module's submodules, where torch looks for the training flag once it is no attribute: notes who asks for it.

    Classes stay as they are, since a forward may go by them.
    """

    owner: nn.Module
    training: bool
    readers: Readers

    def __contains__(self, name: object) -> bool:
        """Has the flag where the module looks an attribute up; not where it sets one."""
        if name == "training" and sys._getframe(1).f_code is _LOOKS_UP:
            return True
        return super().__contains__(name)

    def __missing__(self, name: str) -> bool:
        """Gives the flag, and notes whether its owner asks by itself."""
        if name != "training":
            raise KeyError(name)
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__getattr__" and frame.f_back is not None:
            frame = frame.f_back
        self.readers.setdefault(id(self.owner), []).append(frame.f_locals.get("self") is self.owner)
        return self.training


@contextmanager
def _noting_readers(module: nn.Module) -> Iterator[Readers]:
    """Collects whose ``training`` is read, by id, and of each time whether by itself."""
    readers: Readers = {}
    children = [child for child in module.modules() if "training" in child.__dict__]
    shared = [(child.training, child._modules) for child in children]
    for child, (training, modules) in zip(children, shared, strict=True):
        flags = _Flags(modules)
        flags.owner, flags.training, flags.readers = child, training, readers
        child.__dict__["_modules"] = flags
        del child.__dict__["training"]
    try:
        yield readers
    finally:
        for child, (training, modules) in zip(children, shared, strict=True):
            own = dict(child._modules)
            modules.clear()
            modules.update(own)
            child.__dict__.update(training=training, _modules=modules)


@contextmanager
def _switched_on(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Sets flags for the while."""
    chosen = list(modules)
    try:
        for child in chosen:
            child.training = True
        yield
    finally:
        for child in chosen:
            child.training = False


@dataclass(frozen=True)
class _Observation:
    draws: int
    rates: tuple[tuple[str, float], ...]  # with the kinds of the draws
    structure: tuple[Any, ...]
    values: list[Tensor]
    written: frozenset[str]
    changed: frozenset[tuple[str, str]]  # attributes, as (module, name)
    readers: Readers


def _observe(module: nn.Module, rows: Rows, *, seed: int, drawn: list[Draw] | None = None) -> _Observation:
    before, raw = _attributes(module), []
    kept = [(child, dict(child.__dict__)) for child in module.modules()]

    def keep(result: Any) -> Tensor:
        raw.append(result)
        return next(leaf for leaf in _flat(result)[0] if isinstance(leaf, Tensor))

    with _noting_readers(module) as readers:
        source, spy = record(module, rows, keep, seed=seed, draws=drawn)
    leaves, spec = _flat(raw[0])
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    structure = (str(spec), *((tuple(value.shape), value.dtype) for value in values))
    changed = frozenset(key for key, value in _attributes(module).items() if before.get(key) != value)
    for child, attributes in kept:  # counters and the like, on the shadow: the passes start where the user's module is
        child.__dict__.clear()
        child.__dict__.update(attributes)
    draws, rates = len(source.draws) + len(spy.escaped), tuple((draw.kind, draw.p) for draw in source.draws)
    return _Observation(draws, rates, structure, values, frozenset(spy.written), changed, readers)


def _flat(result: Any) -> tuple[list[Any], Any]:
    """Gives what a network returned as a list, and how it was nested; of an object unknown to torch, its values."""
    leaves, spec = _pytree.tree_flatten(result)
    known = any(isinstance(leaf, Tensor) for leaf in leaves) or not hasattr(result, "__dict__")
    return (leaves, spec) if known else _pytree.tree_flatten(vars(result))


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain values that modules keep about themselves, such as step counters."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def probe(module: nn.Module, rows: Rows) -> dict[str, Verdict]:
    """Gives for each module that reads its training flag what switching it on does; all flags are off at the end."""
    base = _observe(module, rows, seed=_SEEDS[0])
    return _together(module, rows, _each(module, rows, base, {}))


def _each(module: nn.Module, rows: Rows, base: _Observation, known: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Looks at flags that were read in an observation and are not known, one by one beside those that are on."""
    verdicts = {}
    for path, child in module.named_modules():
        if id(child) not in base.readers or path in known:
            continue
        if isinstance(child, _NormBase):
            verdicts[path] = Verdict("norm", "a norm layer: its running statistics stay frozen")
        elif _only_drops(child, by_itself=all(base.readers[id(child)])):
            verdicts[path] = Verdict("stochastic", "draws random numbers", len(base.readers[id(child)]))
        else:
            verdicts[path] = _effect(module, child, rows, base)
    return verdicts


def _together(module: nn.Module, rows: Rows, verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """Looks at flags that are read, or draw, only where others are on, as in ``if self.training: x = self.drop(x)``.

    Of those without an effect of their own, the ones that draws need are switched on.
    """
    by_path, verdicts = dict(module.named_modules()), dict(verdicts)

    def observed(*kinds: str, but: str | None = None) -> tuple[_Observation, dict[str, Verdict]]:
        with _switched_on(by_path[path] for path, one in verdicts.items() if one.kind in kinds and path != but):
            seen = _observe(module, rows, seed=_SEEDS[0])
            return seen, _each(module, rows, seen, verdicts)

    while True:
        seen, found = observed("stochastic", "inert")
        if not found:
            break
        verdicts |= found
    inert = [path for path, one in verdicts.items() if one.kind == "inert"]
    if inert and observed("stochastic")[0].draws < seen.draws:
        for path in inert:
            missing = seen.draws - observed("stochastic", "inert", but=path)[0].draws
            if missing > 0:
                verdicts[path] = Verdict("stochastic", "lets others draw", missing)
    return verdicts


def _only_drops(layer: nn.Module, *, by_itself: bool) -> bool:
    """Whether a flag is read by nothing but one of torch's dropout layers, whose code says what it does."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return takes_masks(layer) and by_itself and not hooked and 0 <= float(layer.p) <= 1  # type: ignore[arg-type]


def _effect(module: nn.Module, child: nn.Module, rows: Rows, base: _Observation) -> Verdict:
    """Says what a flag does that is switched on; a second look is for what the first does not settle."""
    drawn: list[Draw] = []
    try:
        with _switched_on([child]):
            first = _observe(module, rows, seed=_SEEDS[0], drawn=drawn)
            altered = _altered(first, base)
            if first.draws > base.draws and first.structure == base.structure and not altered:
                return Verdict("stochastic", "draws random numbers", first.draws - base.draws)
            second = _observe(module, rows, seed=_SEEDS[1])
            hidden = _hidden_draws(module, rows, base, first)
    except Exception as error:  # any failure but of memory means that this is not a flag to switch on
        if out_of_memory(error):
            raise
        said = f"fails in training mode: {type(error).__name__}: {str(error)[:100]}"
        return Verdict("refused", said, max(0, len(drawn) - base.draws))
    draws = max(first.draws, second.draws) - base.draws
    if altered:
        return Verdict("refused", altered, draws + hidden)
    if first.structure == second.structure != base.structure:  # else the shape of the output itself is random
        return Verdict("refused", "returns something else in training mode", draws + hidden)
    if {first.draws, second.draws} != {base.draws}:
        return Verdict("stochastic", "draws random numbers", draws)
    if _same(first, base):
        return Verdict("inert", "no effect on this input")
    if not _same(first, second):
        with _switched_on([child]):
            repeated = _same(first, _observe(module, rows, seed=_SEEDS[0]))
        # a rate that is 0 in eval; elsewhere draws in eval would hide what else the flag does
        if repeated and (first.rates != base.rates or _same(base, _observe(module, rows, seed=_SEEDS[1]))):
            return Verdict("stochastic", "draws random numbers that have no effect in eval mode")
        return Verdict("refused", "gives other numbers at each call, from a generator out of sight", 1)
    none = "" if hidden else ", without a draw"
    return Verdict("refused", f"computes something else in training mode{none}", hidden)


def _same(one: _Observation, other: _Observation) -> bool:
    return all(identical(a, b) for a, b in zip(one.values, other.values, strict=True))


def _hidden_draws(module: nn.Module, rows: Rows, base: _Observation, seen: _Observation) -> int:
    """How many draws, of flags that are read only where another is on, the first output would follow."""
    others = [one for one in module.modules() if id(one) in seen.readers.keys() - base.readers.keys()]
    with _switched_on(one for one in others if not isinstance(one, _NormBase)):
        first, second = (_observe(module, rows, seed=seed) for seed in _SEEDS) if others else (seen, seen)
    return 0 if identical(first.values[0], second.values[0]) else first.draws - seen.draws


def _altered(seen: _Observation, base: _Observation) -> str:
    """Says what a pass in training mode writes to or changes and one in eval does not; empty where there is nothing."""
    written, changed = seen.written - base.written, seen.changed - base.changed
    if written:
        return f"writes to {', '.join(sorted(written))} in training mode"
    return f"changes its attribute {min(changed)[1]} in training mode" if changed else ""
