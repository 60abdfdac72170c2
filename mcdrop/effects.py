"""What switching on the training flag of one module does, or those of several modules of one class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mcdrop.forward import out_of_memory
from mcdrop.observed import Observation, Observer, altered, same, steady
from mcdrop.record import ALL_HIGH, ALL_LOW

__all__ = ["EXTREMES", "LOOKS", "OUT_OF_SIGHT", "SEEDS", "Verdict", "Verdicts", "effects"]

SEEDS = (1, 2)
OUT_OF_SIGHT = "gives other numbers at each call, from a generator out of sight"
EXTREMES = (ALL_LOW, ALL_HIGH)  # where a threshold that few numbers pass shows
LOOKS = 4  # at what may come by chance


@dataclass(frozen=True)
class Verdict:
    """What a module's training flag does, in words.

    ``kind`` is "stochastic" (draws and nothing else), "inert" (no effect on this input), "norm" or "refused"; ``draws``
    counts the random draws that the flag switches on.
    """

    kind: str
    reason: str
    draws: int = 0


Verdicts = dict[str, Verdict]


def effects(look: Observer, several: Mapping[str, nn.Module], base: Observation, on: Sequence[nn.Module]) -> Verdicts:
    """Says what the flags of modules of one class do: one by itself, then the others, which mostly do the same."""
    (first, child), *rest = several.items()
    others, like = dict(rest), _effect(look, child, base, on)
    seen = _together(look, others, like, base, on) if len(others) > 1 else []
    if seen and _as_one(seen, base, like, others):
        return dict.fromkeys(several, like)
    verdicts = {first: like} | {path: _effect(look, child, base, on) for path, child in rest}
    silent = seen and not any(one.draws for one in seen) and all(one.kind == "inert" for one in verdicts.values())
    if silent and not steady(seen[0], looks=LOOKS):
        return dict.fromkeys(several, Verdict("refused", OUT_OF_SIGHT, 1))  # by chance, and not when it is looked at
    return verdicts


def _together(
    look: Observer, others: Mapping[str, nn.Module], like: Verdict, base: Observation, on: Sequence[nn.Module]
) -> list[Observation]:
    """Gives passes of some flags together, where that can tell whether they do what one like them does by itself."""
    if like.kind == "refused" or base.draws or (like.kind == "stochastic" and not like.draws):
        return []
    some = [*others.values()]
    parts = [some] if like.draws else [some, some[::2]]  # what two do may cancel out
    passes = [look.attempt([*on, *part], [], seed=SEEDS[0]) for part in parts]
    seen = [one for one in passes if one and not altered(one, base) and one.structure == base.structure]
    return seen if len(seen) == len(passes) else []


def _as_one(seen: Sequence[Observation], base: Observation, like: Verdict, others: Mapping[str, nn.Module]) -> bool:
    """Whether each of some flags draws as often in its own name as one by itself does, or none does anything."""
    drawn = Counter(path for _, _, path in seen[0].rates)
    if any(one.draws != len(others) * like.draws for one in seen) or any(drawn[path] != like.draws for path in others):
        return False
    return bool(like.draws) or all(same(one, base) for one in seen)


def _effect(look: Observer, child: nn.Module, base: Observation, on: Sequence[nn.Module]) -> Verdict:
    """Says what a flag does that is switched on; a second look is for what the first does not settle."""
    try:
        first = look.observe([*on, child], seed=SEEDS[0])
        left = altered(first, base)
        if first.draws > base.draws and first.structure == base.structure and not left:
            return Verdict("stochastic", "draws random numbers", first.draws - base.draws)
        second = look.observe([*on, child], seed=SEEDS[1])
    except Exception as error:  # any failure but of memory means that this is not a flag to switch on
        if out_of_memory(error):
            raise
        said = f"fails in training mode: {type(error).__name__}: {str(error)[:100]}"
        return Verdict("refused", said)
    draws = max(first.draws, second.draws) - base.draws
    if left and not draws and look.counts(first, base) and look.goes_on([*on, child], seed=SEEDS[0]):
        said = "and by it gives other numbers at each call, as with masks drawn before; exclude it if it drops nothing"
        return Verdict("refused", f"{left} {said}", 1)
    if left:
        return Verdict("refused", left, draws)
    if first.structure == second.structure != base.structure:  # else the shape of the output itself is random
        return Verdict("refused", "returns something else in training mode", draws)
    if {first.draws, second.draws} != {base.draws}:
        return Verdict("stochastic", "draws random numbers", draws)
    return _effect_on_draws(look, child, base, on, [first, second])


def _effect_on_draws(
    look: Observer, child: nn.Module, base: Observation, on: Sequence[nn.Module], seen: list[Observation]
) -> Verdict:
    """Says what a flag does that switches on no draw: eval may make draws that have an effect in training alone."""
    without = [base]
    if base.draws:
        without += [look.observe(on, seed=seed) for seed in (SEEDS[1], *EXTREMES)]
        seen = seen + [look.observe([*on, child], seed=seed) for seed in EXTREMES]
    if all(same(one, other) for one, other in zip(seen, without, strict=False)):
        return Verdict("inert", "no effect on this input")
    first = seen[0]
    repeated = steady(first, looks=1)
    if repeated and all(same(first, other) for other in seen[1:]):
        return Verdict("refused", "computes something else in training mode, without a draw")
    # a rate that is 0 in eval; draws in eval would hide what else the flag does, and without any no seed has a say
    if repeated and base.draws and (first.rates != base.rates or all(same(base, other) for other in without)):
        return Verdict("stochastic", "draws random numbers that have no effect in eval mode")
    return Verdict("refused", OUT_OF_SIGHT, 1)
