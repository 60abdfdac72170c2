"""The differential probe: what does switching on the training flag of one module do?

No list of layer types: one flag at a time, on a shadow, and only flags whose effect is "draws random numbers and
nothing else" are kept. (Those that nobody but torch's own dropout layers reads are known to be such.) BatchNorm, moving
averages, losses and auxiliary heads of training stay in eval. Flags without an effect of their own are looked at
together: draws may need several.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mcdrop.effects import EXTREMES, LOOKS, OUT_OF_SIGHT, SEEDS, Verdict, Verdicts, effects
from mcdrop.forward import out_of_memory
from mcdrop.observed import Observation, Observer, same, steady
from mcdrop.outputs import Pick
from mcdrop.record import Draw
from mcdrop.rows import Rows
from mcdrop.shadow import takes_masks

__all__ = ["probe"]

_Passes = Callable[..., list[Observation]]


def probe(module: nn.Module, rows: Rows, pick: Pick) -> Verdicts:
    """Gives for each module that reads its training flag what switching it on does; all flags are off at the end."""
    look = Observer(module, rows, pick)
    base = look.base(SEEDS[0])
    verdicts = _beneath(look, _each(look, base, (), {}))
    return _needed(look, _with_hidden(look, base, verdicts), base)


def _each(look: Observer, base: Observation, on: Sequence[nn.Module], known: Mapping[str, Verdict]) -> Verdicts:
    """Looks at flags that were read in an observation and are not known, one by one beside those that are on."""
    verdicts = {}
    read = {path: child for path, child in look.module.named_modules() if id(child) in base.readers}
    new = {path: child for path, child in read.items() if path not in known}
    norms = {path: child for path, child in new.items() if _keeps_statistics(child)}
    others = [child for child in norms.values() if not type(child).__module__.startswith("torch.")]
    draw = bool(others) and look.observe([*on, *others], seed=SEEDS[0]).draws > base.draws
    asked = dict[type, dict[str, nn.Module]]()
    for path, child in new.items():
        if path in norms and not (draw and child in others):
            verdicts[path] = Verdict("norm", "a norm layer: its running statistics stay frozen")
        elif _only_drops(child, by_itself=all(base.readers[id(child)])):
            verdicts[path] = Verdict("stochastic", "draws random numbers", len(base.readers[id(child)]))
        else:
            asked.setdefault(type(child), {})[path] = child
    for several in asked.values():
        verdicts |= effects(look, several, base, on)
    return {path: verdicts[path] for path in new}


def _keeps_statistics(child: nn.Module) -> bool:
    """Whether this is a norm layer; the flag of torch's own without running statistics is for hooks at the most."""
    torchs = type(child).__module__.startswith("torch.")
    return isinstance(child, _NormBase) and not (torchs and child.running_mean is None)


def _beneath(look: Observer, verdicts: Verdicts) -> Verdicts:
    """Looks at flags that are read only where others are on, as in ``if self.training: x = self.drop(x)``."""
    while True:
        on = _modules(look, verdicts, "stochastic", "inert")
        seen = look.attempt(on, [], seed=SEEDS[0])
        found = {} if seen is None else _each(look, seen, on, verdicts)
        if not found:
            return verdicts
        verdicts = {**verdicts, **found}


def _needed(look: Observer, verdicts: Verdicts, base: Observation) -> Verdicts:
    """Switches on those flags without an effect of their own that draws need, and those that nobody was seen to read.

    Such a one is read out of sight, as by ``vars(self)`` or by a copy of the module.
    """
    look.notes = False  # which takes the flags from where they are read then
    by_path = dict(look.module.named_modules())
    unread = [path for path, one in by_path.items() if path not in verdicts and not isinstance(one, _NormBase)]
    inert = [path for path, one in verdicts.items() if one.kind == "inert"]
    chosen = _modules(look, verdicts, "stochastic")

    def on(paths: Collection[str]) -> list[nn.Module]:
        return [*chosen, *(by_path[path] for path in paths)]

    @cache
    def observed(paths: frozenset[str], low: frozenset[str], place: int) -> Observation:
        return look.observe(on(paths), seed=SEEDS[0], low=low)

    def passes(paths: Collection[str], new: Collection[str] = ()) -> list[Observation]:
        """As they are, and where all that the new draws can drop is dropped: where nothing is new, a second look."""
        return [observed(frozenset(paths), frozenset(low), place) for place, low in enumerate(((), new))]

    for hidden in (unread, []):
        try:
            needed = _those_needed(look, passes, hidden, inert)
            if not needed:
                return verdicts
            alone = look.observe([by_path[path] for path in needed], seed=SEEDS[0])
        except Exception as error:  # of several together, which no verdict is about
            if out_of_memory(error):
                raise
            continue
        if alone.draws > base.draws or same(alone, base):
            return {**verdicts, **dict.fromkeys(needed, Verdict("stochastic", "lets others draw", 1))}
        seen = passes(needed)[0]
        draws = seen.draws - passes([])[0].draws
        if not draws and not steady(seen, looks=LOOKS):
            return {**verdicts, **dict.fromkeys(needed, Verdict("refused", OUT_OF_SIGHT, 1))}
        if not hidden and draws > 0:
            lost = Verdict("refused", "computes something else in training mode together with others", draws)
            return {**verdicts, needed[0]: lost}
    return verdicts


def _those_needed(look: Observer, passes: _Passes, hidden: Sequence[str], inert: Sequence[str]) -> list[str]:
    """Gives those of some flags without which passes give other numbers; of inert ones all, or none."""
    whole, chosen = passes([*hidden, *inert])[0], passes([])[0]
    new = {path for _, _, path in Counter(whole.rates) - Counter(chosen.rates)}
    wanted = passes([*hidden, *inert], new)

    def left_out(paths: Sequence[str], others: Sequence[str]) -> list[str]:
        if not paths or _alike(passes(others, new), wanted):
            return []
        if len(paths) == 1:
            return [*paths]
        left, right = paths[: len(paths) // 2], paths[len(paths) // 2 :]
        kept = left_out(left, [*right, *others])
        return kept + left_out(right, [*kept, *others])

    if _alike(passes([], new), wanted):
        return []
    needed = left_out(hidden, inert)
    # one by one would take passes for each of them, and alone they have no effect
    return needed if _alike(passes(needed, new), wanted) else [*needed, *inert]


def _alike(ones: Sequence[Observation], others: Sequence[Observation]) -> bool:
    return all(same(one, other) for one, other in zip(ones, others, strict=True))


def _modules(look: Observer, verdicts: Mapping[str, Verdict], *kinds: str) -> list[nn.Module]:
    by_path = dict(look.module.named_modules())
    return [by_path[path] for path, one in verdicts.items() if one.kind in kinds]


def _only_drops(layer: nn.Module, *, by_itself: bool) -> bool:
    """Whether a flag is read by nothing but one of torch's dropout layers, whose code says what it does."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return takes_masks(layer) and by_itself and not hooked and 0 <= float(layer.p) <= 1  # type: ignore[arg-type]


def _with_hidden(look: Observer, base: Observation, verdicts: Verdicts) -> Verdicts:
    """Counts for flags that stay off the draws of what is read, or draws, only where they are on.

    Those of a way that fails never reach an output, and are only told.
    """
    found = {}
    for path, one in verdicts.items():
        if one.kind != "refused":
            continue
        draws, fails = _hidden_draws(look, path, base, verdicts)
        if draws and fails:
            found[path] = replace(one, reason=f"{one.reason}; {draws} draws before that stay off")
        elif draws:
            reason = one.reason.removesuffix(", without a draw")
            found[path] = replace(one, draws=max(one.draws, draws), reason=reason)
    return {**verdicts, **found}


def _hidden_draws(
    look: Observer, path: str, base: Observation, verdicts: Mapping[str, Verdict]
) -> tuple[int, bool]:  # fmt: skip
    """How many draws of a way that only training takes the output follows, or all and that the way fails."""
    by_path = dict(look.module.named_modules())
    inert = _modules(look, verdicts, "inert")
    known = {*map(id, _modules(look, verdicts, "stochastic", "norm", "refused"))}
    on, new = list[nn.Module](), [by_path[path], *inert]
    while new:  # and then the flags that are read there
        on, drawn = on + new, list[Draw]()
        seen = look.attempt(on, drawn, seed=SEEDS[0])
        known |= {*map(id, on)}
        others = (one for one in by_path.values() if not isinstance(one, _NormBase))
        new = [one for one in others if id(one) in look.readers and id(one) not in known]
    without = look.attempt(inert, [], seed=SEEDS[0]) or base
    if seen is None:
        return max(0, len(drawn) - without.draws), True
    if seen.draws <= without.draws:
        return 0, False
    extremes = [look.observe(on, seed=seed) for seed in EXTREMES]

    def follow(place: int) -> bool:
        return not all(same(seen, one, lambda given: _read(given, base)[place : place + 1]) for one in extremes)

    follows = [follow(place) for place in range(min(len(_read(one, base)) for one in (seen, *extremes)))]
    return (seen.draws - without.draws if follows and all(follows) else 0), False


def _read(seen: Observation, base: Observation) -> list[Tensor]:
    """The output that is read; where training returns something else, all that may be it by their shape."""
    wanted = base.values[0] if base.picked is None else base.picked
    if seen.picked is not None and seen.picked.shape == wanted.shape:
        return [seen.picked]
    return [value for value in seen.values if value.shape == wanted.shape]
