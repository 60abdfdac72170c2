"""Tiers: the ways to run several passes of a torch module; all get the same masks.

``vmap`` batches over the passes, so what comes before the first mask runs once; ``fold`` repeats the rows; ``direct``
runs pass after pass with masks that are made ready at once; ``loop`` gives each pass its own, and is what the others
are checked against. To add a tier, add one function and one line to
``TIERS``.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mcdrop.agreement import difference
from mcdrop.breaking import may_break_off
from mcdrop.decisions import DECISION_RULES, Parted, deciding
from mcdrop.digits import tolerance
from mcdrop.direct import pass_by_pass, passes_of
from mcdrop.errors import UncontrolledDraw
from mcdrop.intercept import Folded, Rules
from mcdrop.mixing import NUMBERS_READ
from mcdrop.outputs import Pick
from mcdrop.quiet import ALONE, first_line
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.trace import Trace, one_pass
from mcdrop.volatile import Left, clean_ways, volatile

__all__ = ["CHECK_PASSES", "TIERS", "Stacks", "choose_tier", "one_by_one"]

Stacks = list[Tensor | None]  # for each draw its masks (T, *unit), or None for its expectation

CHECK_PASSES = 3
_READ: set[Any] = {*DECISION_RULES, *NUMBERS_READ, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose}
_WAYS = 8  # a way that a smaller part of the passes goes is gone pass by pass


def _loop(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = passes_of(stacks)
    each = ([None if stack is None else stack[t] for stack in stacks] for t in range(passes))
    return torch.stack([one_pass(module, rows, pick, found, masks) for masks in each])


def _together(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    present = [stack for stack in stacks if stack is not None]
    known, way = clean_ways(module), tuple(leaf.shape for leaf in rows.leaves)
    read: list[bool] = [bool(found.united)]
    rules: Rules = RULES

    def one(*masks: Tensor) -> Tensor:
        left = iter(masks)
        own = [None if stack is None else next(left) for stack in stacks]
        return one_pass(module, rows, pick, found, own, rules=rules)

    def run() -> Tensor:
        output: Tensor = torch.vmap(one, randomness="error")(*present)
        return output

    if way in known:
        return run()
    # a loss that it adds up on itself would be a batch of passes that nobody can read after this
    before, rules = Left(module), _noting(read)
    try:
        output = run()
        if not any(read) and before.nothing():  # other values may go another way only where some are read
            known.add(way)
    finally:
        before.put_back()
    return output


def _noting(read: list[bool]) -> Rules:
    """The rules, which note besides whether numbers are read out of torch."""

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        rule = RULES.get(function)

        def run(mode: Any, *args: Any, **kwargs: Any) -> Any:
            read.append(True)
            return function(*args, **kwargs) if rule is None else rule(mode, *args, **kwargs)

        return run

    return {**RULES, **{function: noted(function) for function in _READ}}


def one_by_one(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    """Runs pass after pass: directly, or where that was not expected by the loop."""
    try:
        return pass_by_pass(module, rows, pick, found, stacks)
    except UncontrolledDraw:
        return _loop(module, rows, pick, found, stacks)


def _vmap(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    """Runs passes together that decide alike, group after group, and what is left of many ways pass by pass.

    Raises:
        Parted: hardly two passes decide alike.
    """
    left = list(range(passes_of(stacks)))
    order: list[int] = []
    outputs: list[Tensor] = []
    while left:
        some = [stack if stack is None or len(left) == len(stack) else stack[left] for stack in stacks]
        with deciding(len(left)) as stays:
            output = _together(module, rows, pick, found, some)
        if sum(stays) < min(len(left), max(2, len(left) // _WAYS)):
            if not outputs:
                raise Parted("hardly two passes decide alike")
            stays, output = [True] * len(left), one_by_one(module, rows, pick, found, some)
        if all(stays) and not outputs:
            return output
        order += [number for number, stay in zip(left, stays, strict=True) if stay]
        left = [number for number, stay in zip(left, stays, strict=True) if not stay]
        outputs.append(output[torch.tensor(stays, device=output.device)])
    return torch.cat(outputs)[torch.tensor(order, device=outputs[0].device).argsort()]


def _fold(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = passes_of(stacks)
    copies = rows.map(lambda leaf: leaf.repeat(passes, *(1,) * (leaf.dim() - 1)))
    output = one_pass(module, copies, pick, found, stacks, Folded)
    return output.reshape(passes, rows.count, *output.shape[1:])


TIERS: dict[str, Callable[[nn.Module, Rows, Pick, Trace, Stacks], Tensor]] = {
    "direct": pass_by_pass,
    "fold": _fold,
    "loop": _loop,
    "vmap": _vmap,
}


def choose_tier(
    module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks, told: Stacks
) -> tuple[str, str]:
    """Gives the tier to use and why: vmap where it equals the loop on the same masks, else the faster of the rest.

    ``told`` are masks that tell, beside usual ones; they count where the loop takes them. So does a row alone, which
    other numbers of rows are not: ``fold`` makes several of it.
    """
    seconds, reasons, before = {}, [], Left(module)
    wanted: list[tuple[Rows, Stacks, Tensor]] = []
    # where the draws belong to one number of rows, the plan is never asked for another
    beside = [(rows, told)] if found.unclear else [(rows, told), (rows.take(slice(0, 1)), stacks)]
    with torch.no_grad(), ALONE, warnings.catch_warnings():
        # where torch only loops inside vmap, nothing is gained, and users would see its warning
        warnings.filterwarnings("error", message=".*performance drop.*")
        expected, seconds["loop"] = _timed(TIERS["loop"], module, rows, pick, found, stacks)
        for given, masks in beside:
            with may_break_off(module):
                wanted.append((given, masks, TIERS["loop"](module, given, pick, found, masks)))
        # where rows of other passes lie in one batch, what a network writes to itself may be made of all of them
        apart = found.united or ("it writes to itself" if volatile(module) else "")
        for tier in ("vmap", "direct") if apart else ("vmap", "fold", "direct"):
            try:
                got, seconds[tier] = _timed(TIERS[tier], module, rows, pick, found, stacks)
                worst = difference(got, expected, passes=expected)
                for given, masks, right in wanted:
                    moved = right if masks is told else expected  # one row alone may hardly be moved
                    worst = max(worst, difference(_run(tier, module, given, pick, found, masks), right, passes=moved))
            except Exception as error:  # whatever a network does there, the loop is right
                before.put_back()  # a forward that is broken off may leave the network half changed
                reasons.append(f"{tier} does not take this network: {first_line(error)}")
                seconds.pop(tier, None)
                continue
            if worst > tolerance(expected.dtype):
                del seconds[tier]
                reasons.append(f"{tier} differs from the loop by {worst:.1e}")
            elif tier == "vmap":
                return tier, "equals the loop; what comes before the first draw is run once"
            elif tier == "direct":  # the same in fewer steps
                del seconds["loop"]
    if apart:
        reasons.append(f"fold would mix passes: {apart}")
    best = min(seconds, key=lambda tier: seconds[tier])
    agrees = "equals the loop" if best != "loop" else "the way that the others are checked against"
    return best, "; ".join([agrees, *reasons])


def _run(tier: str, module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    """Runs passes by a tier, one by one where they decide otherwise than one another."""
    try:
        return TIERS[tier](module, rows, pick, found, stacks)
    except Parted:
        each = ([None if one is None else one[t : t + 1] for one in stacks] for t in range(passes_of(stacks)))
        return torch.cat([TIERS[tier](module, rows, pick, found, one) for one in each])


def _timed(
    run: Callable[[nn.Module, Rows, Pick, Trace, Stacks], Tensor],
    module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks,
) -> tuple[Tensor, float]:  # fmt: skip
    """Gives the output and the shorter of two times."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        output = run(module, rows, pick, found, stacks)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        times.append(time.perf_counter() - began)
    return output, min(times)
