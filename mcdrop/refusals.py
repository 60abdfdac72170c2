"""What a refusal says of a network, and what would work: found by more passes, which only a refusal takes."""

from collections.abc import Sequence

import torch
from torch import nn

from mcdrop.audit import Audit
from mcdrop.errors import ModelRefused
from mcdrop.forward import draws_off, may_fail
from mcdrop.generators import known, stepped
from mcdrop.observed import Observer
from mcdrop.outputs import Pick
from mcdrop.rows import Rows
from mcdrop.shadow import reached_originals
from mcdrop.trace import Trace

__all__ = ["PARTIAL", "check_reach", "none_message", "whose"]

_TRAINED = (
    "Train it with dropout (torch.nn.Dropout with 0 < p < 1, or F.dropout(..., training=self.training)), or check that "
    "it was not stripped when the network was exported"
)
_KERAS = (
    "Layers of Keras drop by the argument training= of a call and not by the flag of a module: wrap a module whose "
    "forward calls them with training=self.training"
)
PARTIAL = "accept partial coverage with strict=False"
_SEED = 1
_TRIES = 16


def whose(live: nn.Module, rows: Rows, pick: Pick, lost: Sequence[str]) -> tuple[list[str], str]:
    """Gives what draws, by the modules whose training flags start it where that is out of sight, and a last remedy.

    Partial coverage is none where other draws follow a draw out of sight. All flags of the shadow are off after this.
    """
    on = {path: child for path, child in live.named_modules() if child.__dict__.get("training")}
    for child in on.values():
        child.training = False
    look, said, paths, steady = Observer(live, rows, pick), dict.fromkeys(lost, ""), dict[str, None](), True
    for name in [*known()]:
        if (place := f"{name} in the root module") in said:
            with may_fail():
                found = _starting(look, on, name)
                steady = steady and _steady(look, [*on.values()], name)
                paths |= dict.fromkeys(found)
                if found and found != [""]:
                    said[place] = f"{name} where {' or '.join(map(repr, found))} is in training mode"
    last = f"switch that off with exclude={[*paths]}" if paths else ""
    return [text or place for place, text in said.items()], ", or ".join(filter(None, [last, PARTIAL * steady]))


def _starting(look: Observer, on: dict[str, nn.Module], name: str) -> list[str]:
    """Gives the modules without whose flags a pass leaves a generator as it is; none where it draws all the same."""
    kept = list[nn.Module]()

    def moves(paths: Sequence[str]) -> bool:
        seen = look.observe([*kept, *(on[path] for path in paths)], seed=_SEED)
        return any(operation == name for _, operation in seen.escaped)

    def among(paths: Sequence[str]) -> list[str]:
        if not moves(paths):
            kept.extend(on[path] for path in paths)
            return []
        if len(paths) == 1:
            return [*paths]
        half = len(paths) // 2
        return among(paths[:half]) + among(paths[half:])

    return [] if moves([]) else among([*on])


def _steady(look: Observer, on: Sequence[nn.Module], name: str) -> bool:
    """Whether the same draws follow whatever a generator out of sight gives."""
    first = look.observe(on, seed=_SEED).rates
    for _ in range(_TRIES):
        stepped(name)
        if look.observe(on, seed=_SEED).rates != first:
            return False
    return True


def check_reach(module: nn.Module, live: nn.Module, rows: Rows, pick: Pick) -> None:
    """Checks that a shadow runs its own modules alone.

    Raises:
        ModelRefused: it reaches one of the network's own.
    """
    with torch.no_grad():
        reached = reached_originals(module, lambda: draws_off(live, rows, pick))
    if reached:
        called = ", ".join(f"{path!r} (in {name})" for path, name in reached.items())
        raise ModelRefused(
            f"{type(module).__name__} calls its own module {called} through a reference that cannot be followed (a "
            "closure, a global, a list that its class keeps or another object), so its draws would stay off; call it "
            "as an attribute"
        )


def none_message(live: nn.Module, audit: Audit, found: Trace) -> str:
    """Says of a network without a live draw what was looked at and found."""
    seen = "; ".join(f"{site.path or 'root'}: {site.kind}, {site.reason}" for site in audit.sites) or "no draw at all"
    kept = "".join(f"; {path or 'root'} {reason}" for path, reason in audit.kept.items())
    off = sorted({path or "root" for path in found.off if path is not None})
    literal = f"; dropout switched off in {', '.join(off)} (force_literal=True drops there)" if off else ""
    keras = any(type(child).__module__.startswith("keras.") for child in live.modules())
    remedy = _KERAS if keras else _TRAINED
    return (
        f"{audit.model} has no live stochastic site: every variance would be 0. Looked at {audit.modules} modules and "
        f"found: {seen}{kept}{literal}. {remedy}"
    )
