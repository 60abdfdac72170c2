"""The plans of a network: one for each input signature, made when rows of such shapes are first seen."""

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from mcdrop.decisions import Parted
from mcdrop.digits import digits
from mcdrop.errors import InputError
from mcdrop.flags import Flags
from mcdrop.forward import Outputs, as_numpy, draws_off, out_of_memory, place_of, placed, said_of
from mcdrop.generators import own_generator, with_private
from mcdrop.locks import new_lock
from mcdrop.outputs import Pick
from mcdrop.plan import CAPTURED, Plan, Tuning, straight
from mcdrop.planning import make_plan, told_stacks
from mcdrop.program import Values
from mcdrop.reach import NEAR
from mcdrop.rows import Rows
from mcdrop.stacks import Bits, Kept, Span, block_bytes, expected_stack, stack
from mcdrop.standing import state_of
from mcdrop.tiers import CHECK_PASSES, TIERS, Stacks, choose_tier, one_by_one
from mcdrop.trace import Trace, trace, widened

__all__ = ["Plans"]

_MASK_BYTES = 64 * 2**20  # of masks
_VALUE_BYTES = 64 * 2**20  # of what a captured program makes of them
_GPU_SHARE = 32  # of a GPU's memory for each: it waits for masks that a CPU draws
_FEW = 4


class Plans:
    """The plans of a network by input signature, and the masks that they need; safe to use from several threads."""

    def __init__(
        self, live: nn.Module, plain: nn.Module, pick: Pick, excluded: frozenset[str], force: Callable[[str], bool], *,
        precision: str, compiled: bool, tuning: Tuning | None, flags: Flags,
    ) -> None:  # fmt: skip
        """Takes what a backend takes."""
        self.live, self.plain, self.pick, self.excluded, self.force = live, plain, pick, excluded, force
        self.precision, self.compiled, self.tuning, self._flags = precision, compiled, tuning, flags
        held = [(one, tensor) for one in state_of(live) if (tensor := one.now()) is not None]
        held.sort(key=lambda one: not isinstance(one[1], nn.Parameter))  # buffers may have more digits than weights
        kind = place_of([*live.parameters(), *live.buffers()])[1]
        floating = next((one for one, tensor in held if tensor.dtype == kind), None)
        self._telling = held[0][0] if held else None, floating
        self._plans: dict[object, Plan] = {}
        self._known: tuple[object, Trace | None] = None, None
        self.seen: tuple[Rows, Trace] | None = None  # when the network was wrapped
        self._lock = new_lock()
        self._latest = threading.local()
        self._eager_tiers: dict[int, str] = {}
        device = self._place()[0]
        share = torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE if device.type == "cuda" else 0
        self._masks, self._values = Kept(max(_MASK_BYTES, share)), Kept(max(_VALUE_BYTES, share))
        # forwards of the shadows go one at a time: networks keep things on themselves while they run
        self.turn = new_lock()

    def prepare(self, rows: Rows) -> tuple[Plan, Rows]:
        """Gives how passes of such rows are run, and the rows as tensors."""
        return self.current(rows)[:2]

    def current(self, rows: Rows) -> tuple[Plan, Rows, list[Tensor] | None]:
        """Gives the same, and the weights of today where the network is captured."""
        place = self._place()
        plan = self._at(rows, place)
        weights = plan.today()
        if weights is None and plan.program is not None:
            with self._lock:
                self._plans = {}
                self._eager_tiers.clear()
                self._values.clear()
            plan = self._at(rows, place)
            weights = plan.today()
        return plan, placed(rows, *place), weights

    def plan(self, rows: Rows) -> Plan:
        """Gives how passes of rows of such shapes are run; traced and checked when they are first seen."""
        return self._at(rows, self._place())

    def _at(self, rows: Rows, place: tuple[torch.device, torch.dtype]) -> Plan:
        latest = getattr(self._latest, "found", None)  # the engine asks several times of the same rows
        if latest is not None and latest[0]() is rows and latest[1] == place and latest[3] is self._plans:
            found: Plan = latest[2]
            return found
        signature, plans = self._signature(rows, place), self._plans
        # where the rows' axis of a draw is not known, its mask belongs to this number of rows alone, and still does
        # when that axis is known of others
        plan = plans.get((signature, rows.count)) or plans.get(signature)
        if plan is None:
            with self._lock, self.turn:
                plans = self._plans
                plan = plans.get((signature, rows.count)) or plans.get(signature)
                if plan is None:
                    plan = self._made(placed(rows, *place))
                    plans[(signature, rows.count) if plan.trace.unclear else signature] = plan
        self._latest.found = weakref.ref(rows), place, plan, plans
        return plan

    @staticmethod
    def _signature(rows: Rows, place: tuple[torch.device, torch.dtype]) -> tuple[object, ...]:
        """What tells apart the rows of plans; arrays and tensors are alike, since they are run as the same tensors."""
        return (*((leaf.shape[1:], _name(leaf.dtype)) for leaf in rows.leaves), *rows.kwargs, place)

    def knows(self, rows: Rows, found: Trace) -> None:
        """Takes what a trace of such rows has found just now, so that their plan need not trace them again."""
        self.seen = rows, found
        if not found.unclear:
            self._known = self._signature(rows, self._place()), found

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the network is now, told by its first weight and the first one of the type that rows have."""
        first, typed = (None if one is None else one.now() for one in self._telling)
        kind = torch.get_default_dtype() if typed is None else typed.dtype
        return torch.device("cpu") if first is None else first.device, kind

    def _made(self, tensors: Rows) -> Plan:
        # looked at and proved with all digits, also where passes leave some out: then a difference is an error
        verdicts = dict(self._flags.verdicts)
        with said_of(tensors), digits(tensors.leaves[0].device), self._flags.under(verdicts):
            plan = replace(self._proved(tensors), verdicts=verdicts)
        if self.compiled and self.precision == "tf32" and plan.program is not None:
            self._run_once(plan, tensors)
        return plan

    def _run_once(self, plan: Plan, tensors: Rows) -> None:
        """Lets torch compile for tf32 now, which it takes for another setting than the one that was proved."""
        assert plan.program is not None
        masks = [stack for stack in self.stacks(plan, Span(CHECK_PASSES, 0, 0, "iid")) if stack is not None]
        with torch.no_grad(), self.arithmetic(tensors):
            for rows in (tensors, tensors.take(slice(0, 1))):
                if rows.count >= plan.program.fewest_rows:
                    straight(plan.program, plan.program.masks(masks), rows, CHECK_PASSES)

    def _proved(self, tensors: Rows) -> Plan:
        (known, found), self._known = self._known, (None, None)
        if found is None or known != self._signature(tensors, self._place()):
            with own_generator():
                with_private(self.live, most=NEAR)
                self._flags.look(tensors)
                found = trace(self.live, tensors, self.pick, self.force, self.seen and self.seen[1])
            self._flags.check(found)
        off = found.left_off(self.excluded)
        if len(off) == len(found.sites):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tensors.leaves)
            raise InputError(
                f"no draw of the network is on for inputs of the shape {shapes}: all passes would be alike"
            )

        def some(found: Trace, passes: int) -> Stacks:
            return self.stacks(Plan(found, off, "loop", ""), Span(passes, 0, 0, "iid"))

        plan = make_plan(
            self.live, self.plain, tensors, self.pick, found, off, some,
            precision=self.precision, compiled=self.compiled, tuning=self.tuning,
            flags=self._flags,
        )  # fmt: skip
        # what is drawn together is of use to the passes that follow, also where it is large
        self._masks.most = max(self._masks.most, sum(block_bytes(site, self._place()[0]) for site in plan.on))
        if plan.program is not None and self.tuning is None:
            self.tuning = Tuning(plan.chunk, plan.kept_from)
        return plan

    def stacks(self, plan: Plan, span: Span) -> Stacks:
        """Gives the masks of some passes, one stack a draw; None for draws that are left off."""
        # less than a block of passes that depend on one another: the whole of it is drawn once, for its other parts too
        parts = []
        for block in span.blocks() or [span]:
            first, last = max(span.start, block.start), min(span.start + span.passes, block.start + block.passes)
            cut = slice(first - block.start, last - block.start)
            parts.append([None if one is None else one[cut] for one in self._drawn(plan, block)])
        if len(parts) == 1:
            return parts[0]
        return [None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)]

    def _drawn(self, plan: Plan, span: Span) -> list[Tensor | Bits | None]:
        device = self._place()[0]
        return [
            None
            if site.name in plan.off
            else self._masks.get((site, span, device), lambda site=site: stack(site, span, device))  # type: ignore[misc]
            for site in plan.trace.sites
        ]

    def values(self, plan: Plan, span: Span, *, ride: bool) -> Values:
        """Gives what a captured program makes of the masks of some passes."""

        def made() -> Values:
            stacks = self.stacks(plan, span)
            with self._digits(self._place()[0]):
                return plan.mask_values(stacks, ride=ride)

        values: Values = self._values.get((plan.program, span, ride), made)
        return values

    def release(self) -> None:
        """Lets go of masks and what follows from them, which can be made again."""
        self._masks.clear()
        self._values.clear()

    def expected_values(self, plan: Plan) -> Values:
        """Gives what a captured program makes of masks that hold their expectations, those of a single pass."""
        program, device = plan.program, self._place()[0]
        assert program is not None

        def made() -> Values:
            with self._digits(device):
                return program.masks([expected_stack(site, device) for site in plan.on])

        values: Values = self._values.get((program, "expected", device), made)
        return values

    def through(self, plan: Plan, tensors: Rows, stacks: Stacks, tier: str | None = None) -> Tensor:
        """Runs the passes of given masks by a tier (None: the plan's); a draw whose stack is None is expected.

        To be asked in ``turn``.
        """
        tier = tier or plan.tier
        if tier == CAPTURED and _whole(plan, stacks) and plan.program is not None:
            present = [stack for stack in stacks if stack is not None]
            program = plan.program.plain
            return straight(program, program.masks(present), tensors, len(present[0]))
        # a single pass has nothing to batch, and vmap's rules only cost
        single = all(stack is None or len(stack) == 1 for stack in stacks)
        with self._flags.under(plan.verdicts):
            tier = "loop" if single else self._eager(plan, tensors) if tier == CAPTURED else tier
            self._flags.begin()
            output = self._by(tier, plan, tensors, stacks)
            while self._flags.end(tensors):
                output = self._by(tier, plan, tensors, stacks)
        return output

    def _by(self, tier: str, plan: Plan, tensors: Rows, stacks: Stacks) -> Tensor:
        run = one_by_one if tier == "direct" else TIERS[tier]
        # with the masks of some draws alone, what is written to in place may lack the axis of the passes
        mixed = tier == "vmap" and (bool(plan.trace.united) or not _whole(plan, stacks))
        try:
            return run(self.live, tensors, self.pick, plan.trace, stacks)
        except Exception as error:  # of a way that the check did not go; the network's own comes again
            if out_of_memory(error) or not (mixed or isinstance(error, Parted)):
                raise
        return one_by_one(self.live, tensors, self.pick, plan.trace, stacks)

    def _eager(self, plan: Plan, tensors: Rows) -> str:
        """The tier for what a captured program does not stand for: other sizes, or one draw alone. Found when asked."""
        if id(plan.trace) not in self._eager_tiers:
            few = tensors.take(slice(0, _FEW))
            stacks = self.stacks(plan, Span(CHECK_PASSES, 0, 0, "iid"))
            told = told_stacks(plan.trace, plan.off, few)
            self._eager_tiers[id(plan.trace)] = choose_tier(self.live, few, self.pick, plan.trace, stacks, told)[0]
        return self._eager_tiers[id(plan.trace)]

    def deterministic(self, rows: Rows) -> Outputs:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        try:
            _, tensors = self.prepare(rows)
            with torch.no_grad(), self.turn, self.arithmetic(tensors), said_of(tensors):
                return as_numpy(draws_off(self.plain, tensors, self.pick))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or rows.count == 1:
                raise
        return np.concatenate([self.deterministic(block) for block in rows.split(-(-rows.count // 2))])

    def widened(self, plan: Plan, tensors: Rows) -> Plan:
        """Gives a plan whose draws are as large as these rows ask for, and keeps it for later ones."""
        with self._lock, self.turn, self.arithmetic(tensors), said_of(tensors), self._flags.under(plan.verdicts):
            wide = replace(plan, trace=widened(plan.trace, self.live, tensors, self.pick, self.force))
            self._plans = {key: wide if kept is plan else kept for key, kept in self._plans.items()}
        return wide

    def arithmetic(self, rows: Rows) -> AbstractContextManager[None]:
        """Lets a GPU multiply in tf32 where that is the precision, and only there, whatever torch's own switch says.

        Casts that the caller has switched on (``torch.autocast``) are off in it.
        """
        return self._digits(rows.leaves[0].device)

    def _digits(self, device: torch.device) -> AbstractContextManager[None]:
        return digits(device, tf32=self.precision == "tf32")


def _whole(plan: Plan, stacks: Stacks) -> bool:
    """Whether all draws have masks that the plan does not leave off."""
    return [stack is None for stack in stacks] == [site.name in plan.off for site in plan.trace.sites]


@cache
def _name(dtype: object) -> str:
    """The name of a type; real numbers become the network's own, whichever they come as."""
    name = str(dtype).removeprefix("torch.")
    return "real" if "float" in name else name
