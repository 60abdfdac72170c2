"""Making a plan: captured where that equals the loop, else by a tier that does."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, fx, nn

from mcdrop.agreement import difference
from mcdrop.capture import Captured, NotCaptured, capture
from mcdrop.checks import mean_preserving
from mcdrop.digits import tolerance
from mcdrop.errors import InputError, ModelRefused, UnknownName
from mcdrop.flags import Flags
from mcdrop.forward import draws_off, place_of
from mcdrop.outputs import Pick
from mcdrop.plan import CAPTURED, Plan, Tuning, calibrated, straight
from mcdrop.program import Program
from mcdrop.quiet import quiet
from mcdrop.rows import Rows
from mcdrop.stacks import expected_stack, telling_stack
from mcdrop.tiers import CHECK_PASSES, TIERS, Stacks, choose_tier
from mcdrop.trace import Trace, repeat_rows
from mcdrop.volatile import Left

__all__ = ["LARGEST_ERROR", "PRECISIONS", "check_precision", "make_plan", "told_stacks"]

PRECISIONS: dict[str, torch.dtype | None] = {"bf16": torch.bfloat16, "fp32": None, "tf32": None}
LARGEST_ERROR = 0.2  # of a lower precision, in standard deviations: it adds 4 % to the variance at most
_ROWS = 4
_SPREAD_PASSES = 32


def check_precision(module: nn.Module, precision: str) -> None:
    """Checks a precision against a network.

    Raises:
        InputError: it is unknown, the network is not float32, or tf32 is asked for on a CPU.
    """
    UnknownName.check("precision", precision, PRECISIONS)
    if precision == "fp32":
        return
    device, dtype = place_of([*module.parameters(), *module.buffers()])
    if dtype != torch.float32:
        raise InputError(f"precision={precision!r} is for float32 networks; this one is {dtype}")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision='tf32' needs a CUDA device, and the network is on {device}; try 'bf16'")


def make_plan(
    live: nn.Module, plain: nn.Module, rows: Rows, pick: Pick, found: Trace, off: frozenset[str],
    stacks_of: Callable[[Trace, int], Stacks], *, precision: str = "fp32", compiled: bool = False,
    tuning: Tuning | None = None, flags: Flags,
) -> Plan:  # fmt: skip
    """Gives the way to run passes of such rows: each way is compared with the loop on the same masks first.

    Raises:
        ModelRefused: a precision or a compilation that needs the network as a graph, where it cannot be captured.
    """
    few = rows if found.unclear else rows.take(slice(0, _ROWS))
    stacks, told, before = stacks_of(found, CHECK_PASSES), told_stacks(found, off, few), Left(live)
    dtype = PRECISIONS[precision]

    @cache
    @torch.no_grad()
    def spread() -> float:
        passes = TIERS["loop"](live, few, pick, found, stacks_of(found, _SPREAD_PASSES))
        variance = passes.double().var(dim=0)
        return float(variance[variance > 0].mean().sqrt())

    try:
        if dtype is not None:  # in full precision first, for what few digits would hide
            prove(Program(capture(live, few, pick, found, stacks)), live, few, pick, found, stacks, told)
        flags.begin()
        captured = capture(live, few, pick, found, stacks, dtype=dtype)
        if flags.read:  # where a graph is written down for other numbers of rows
            raise NotCaptured("other numbers of rows reach layers that these do not")
        program = Program(_of_real_numbers(captured, dtype), dtype=dtype, few_digits=precision == "tf32")
        if compiled:
            program = program.compiled()
        with quiet() if compiled else nullcontext():  # torch's compiler warns of torch
            prove(program, live, few, pick, found, stacks, told, None if dtype is None else spread)
    except NotCaptured as error:
        before.put_back()  # a forward that was broken off may have left it half changed
        if dtype is not None or compiled:
            what = f"precision={precision!r}" if dtype is not None else "compile=True"
            raise ModelRefused(f"{what} needs the network as one graph, and it cannot be captured: {error}") from None
        tier, reason = choose_tier(live, few, pick, found, stacks, told)
        return Plan(found, off, tier, f"{reason}; not captured: {error}")
    plan = Plan(found, off, CAPTURED, "a graph without the network's Python, equal to the loop", program)
    plan = replace(plan, rides=_rides(plan, live, plain, few, pick, stacks), exact=_exact(captured, plan, few, stacks))
    if dtype is None and not compiled:
        plan = replace(plan, kept=_kept(captured, plan, live, few, pick, stacks, told))
    return calibrated(plan, few, partial(stacks_of, found), tuning)


def _of_real_numbers(captured: Captured, dtype: torch.dtype | None) -> Captured:
    """Gives a graph that makes no whole numbers of what has few digits, such as of a column of ids.

    Raises:
        NotCaptured: it does; they could be others.
    """
    few: set[fx.Node] = set()
    for node in captured.graph.nodes if dtype is not None else ():
        made, follows = node.meta.get("val"), not few.isdisjoint(node.all_input_nodes)
        if not isinstance(made, Tensor):
            continue
        if made.dtype == dtype or (made.is_floating_point() and follows):
            few.add(node)
        elif follows and made.dtype != torch.bool and "_to_copy" in str(node.target):
            raise NotCaptured(
                f"it makes whole numbers of real ones, and {dtype} holds those up to 256 alone; give them as whole "
                "numbers, in an input of their own"
            )
    return captured


def prove(
    program: Program, live: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks, told: Stacks,
    spread: Callable[[], float] | None = None,
) -> None:  # fmt: skip
    """Compares with the loop, for several rows and for one, for several passes and for one, and for masks that tell.

    They agree in digits of the largest output. Where outputs are small because much cancelled out, few digits may be
    lost altogether: then a ``spread`` of the passes says how much is too much, as it does in the audit.

    Raises:
        NotCaptured: it differs.
    """
    some = repeat_rows(rows, max(rows.count, 2))
    cases = [(some, stacks), (some, [None if stack is None else stack[:1] for stack in stacks])]
    if spread is None:  # which is that of usual masks
        cases += [(some, told)]
    cases += [(some.take(slice(0, 1)), stacks)]  # the last, since by its passes no other row can be measured
    moving, before = None, Left(live)
    for given, masks in cases:
        with torch.no_grad():
            try:
                expected = TIERS["loop"](live, given, pick, found, masks)
            except Exception:  # a network that takes no single row: its own code will say so when it is given one
                if given is some and masks is not told:
                    raise
                program.fewest_rows = program.fewest_rows if given is some else 2
                before.put_back()
                continue
            try:
                got = straight(program, program.masks([m for m in masks if m is not None]), given, len(expected))
            except Exception as error:  # whatever a graph trips over
                raise NotCaptured(" ".join(str(error).split())[:300] or type(error).__name__) from error
        moving = expected if moving is None or len(expected) > 1 else moving
        worst = difference(got, expected.to(got.dtype), passes=moving.to(program.dtype))
        if worst <= max(tolerance(expected.dtype), tolerance(program.dtype or expected.dtype)):
            continue
        if spread is None or not _apart(got, expected, moving, worst) <= LARGEST_ERROR * spread():
            raise NotCaptured(f"the graph differs from the loop by {worst:.1e}")


def told_stacks(found: Trace, off: frozenset[str], rows: Rows) -> Stacks:
    """Gives masks that tell, None for draws that are off."""
    device = rows.leaves[0].device
    return [None if site.name in off else telling_stack(site, device) for site in found.sites]


def _apart(got: Tensor, expected: Tensor, passes: Tensor, worst: float) -> float:
    """The root mean square of a difference where passes differ; infinite where the largest of all is."""
    moved = (passes.double().var(dim=0) > 0).expand(expected.shape)
    return float((got - expected)[moved].double().square().mean().sqrt()) if worst < math.inf else math.inf


def _exact(captured: Captured, plan: Plan, rows: Rows, drawn: Stacks) -> Program | None:
    """The program with its last layer in closed form, where its mean is that of the expected last mask."""
    assert plan.program is not None
    try:
        exact = Program(captured, dtype=plan.program.dtype, exact=plan.on)
    except NotCaptured:
        return None
    stacks = [expected_stack(site, rows.leaves[0].device) for site in plan.on]
    try:
        with torch.no_grad():
            expected = straight(plan.program, plan.program.masks(stacks), rows, 1)
            mean, _ = straight(exact, exact.masks(stacks), rows, 1).tensor_split(2, dim=-1)
            masks = plan.program.masks([stack for stack in drawn if stack is not None])
            passes = straight(plan.program, masks, rows, CHECK_PASSES).to(plan.program.dtype)
    except Exception:  # whatever a graph trips over, such as masks that are no numbers
        return None
    return exact if difference(mean, expected, passes=passes) <= tolerance(expected.dtype) else None


def _kept(
    captured: Captured, plan: Plan, live: nn.Module, rows: Rows, pick: Pick, stacks: Stacks, told: Stacks
) -> Program | None:
    """The program of kept units, where the network has one and runs on a CPU."""
    if rows.leaves[0].device.type != "cpu":
        return None
    try:
        kept = Program(captured, kept=True)
        prove(kept, live, rows, pick, plan.trace, stacks, told)
    except NotCaptured:
        return None
    return kept


def _rides(plan: Plan, live: nn.Module, plain: nn.Module, rows: Rows, pick: Pick, stacks: Stacks) -> bool:
    """Whether a pass at the masks' expectations is the output with all draws off; in few digits not by chance."""
    program = plan.program
    assert program is not None
    try:
        with torch.no_grad():
            off = draws_off(plain, rows, pick)
            passes = straight(program, plan.mask_values(stacks, ride=True), rows, CHECK_PASSES + 1)
            moving = passes[:-1].to(program.dtype)
        if program.dtype is not None and not mean_preserving(live, plain, rows, pick, plan.trace):
            return False
    except Exception:  # then it is computed on its own
        return False
    return difference(passes[-1], off, passes=moving, by_output=True) <= tolerance(program.dtype or off.dtype)
