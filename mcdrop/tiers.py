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
from mcdrop.decisions import Parted
from mcdrop.digits import tolerance
from mcdrop.direct import pass_by_pass
from mcdrop.errors import UncontrolledDraw
from mcdrop.intercept import Folded
from mcdrop.outputs import Pick
from mcdrop.quiet import ALONE, first_line
from mcdrop.rows import Rows
from mcdrop.trace import Trace, one_pass
from mcdrop.volatile import volatile

__all__ = ["CHECK_PASSES", "TIERS", "Stacks", "choose_tier", "one_by_one"]

Stacks = list[Tensor | None]  # for each draw its masks (T, *unit), or None for its expectation

CHECK_PASSES = 3
_GROUPS = 8  # of passes that decide alike, where there are few passes; and passes to a group, where there are many


def _loop(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = next(len(stack) for stack in stacks if stack is not None)
    each = ([None if stack is None else stack[t] for stack in stacks] for t in range(passes))
    return torch.stack([one_pass(module, rows, pick, found, masks) for masks in each])


def _together(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    present = [stack for stack in stacks if stack is not None]

    def one(*masks: Tensor) -> Tensor:
        left = iter(masks)
        return one_pass(module, rows, pick, found, [None if stack is None else next(left) for stack in stacks])

    output: Tensor = torch.vmap(one, randomness="error")(*present)
    return output


def one_by_one(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    """Runs pass after pass: directly, or where that was not expected by the loop."""
    try:
        return pass_by_pass(module, rows, pick, found, stacks)
    except UncontrolledDraw:
        return _loop(module, rows, pick, found, stacks)


def _vmap(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    """Runs passes together that decide alike, and those of many groups pass by pass.

    Raises:
        Parted: hardly two passes decide alike.
    """
    groups = [list(range(next(len(stack) for stack in stacks if stack is not None)))]
    done: list[tuple[list[int], Tensor]] = []
    most = max(_GROUPS, len(groups[0]) // _GROUPS)
    while groups:
        group = groups.pop()
        some = [stack if stack is None or len(group) == len(stack) else stack[group] for stack in stacks]
        try:
            run = _together if len(done) + len(groups) < most else one_by_one
            done.append((group, run(module, rows, pick, found, some)))
        except Parted as parted:
            parts: dict[Any, list[int]] = {}
            for number, value in zip(group, parted.values, strict=True):
                parts.setdefault(value, []).append(number)
            if len(parts) > max(2, len(group) // 2):
                raise
            groups += parts.values()
    if len(done) == 1:
        return done[0][1]
    order = torch.tensor([number for group, _ in done for number in group], device=done[0][1].device)
    return torch.cat([output for _, output in done])[order.argsort()]


def _fold(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = next(len(stack) for stack in stacks if stack is not None)
    copies = rows.map(lambda leaf: leaf.repeat(passes, *(1,) * (leaf.dim() - 1)))
    output = one_pass(module, copies, pick, found, stacks, Folded)
    return output.reshape(passes, rows.count, *output.shape[1:])


TIERS: dict[str, Callable[[nn.Module, Rows, Pick, Trace, Stacks], Tensor]] = {
    "direct": pass_by_pass,
    "fold": _fold,
    "loop": _loop,
    "vmap": _vmap,
}


def choose_tier(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> tuple[str, str]:
    """Gives the tier to use and why: vmap where it equals the loop on the same masks, else the faster of the rest."""
    seconds, reasons = {}, []
    with torch.no_grad(), ALONE, warnings.catch_warnings():
        # where torch only loops inside vmap, nothing is gained, and users would see its warning
        warnings.filterwarnings("error", message=".*performance drop.*")
        expected, seconds["loop"] = _timed(TIERS["loop"], module, rows, pick, found, stacks)
        # where rows of other passes lie in one batch, what a network writes to itself may be made of all of them
        apart = found.united or ("it writes to itself" if volatile(module) else "")
        for tier in ("vmap", "direct") if apart else ("vmap", "fold", "direct"):
            try:
                got, seconds[tier] = _timed(TIERS[tier], module, rows, pick, found, stacks)
            except Exception as error:  # whatever a network does there, the loop is right
                reasons.append(f"{tier} does not take this network: {first_line(error)}")
                continue
            worst = difference(got, expected)
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
