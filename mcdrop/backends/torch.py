"""Passes of a torch module: masks from ``masks``, the module's live shadow, and a verified tier to run them."""

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.capture import state_of
from mcdrop.errors import InputError
from mcdrop.features import hidden_features, weights_digest
from mcdrop.forward import draws_off, place_of, placed
from mcdrop.intercept import LargerDraw
from mcdrop.outputs import Pick
from mcdrop.plans import CAPTURED, Plan, make_plan, straight
from mcdrop.program import Values
from mcdrop.record import nowhere
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.stacks import Kept, Span, stack
from mcdrop.tiers import TIERS, Stacks, first_line
from mcdrop.trace import Trace, trace, widened

__all__ = ["TorchBackend"]


CHUNK_BYTES = 16 * 2**20  # about a CPU's cache: chunks of 8 to 32 MiB ran fastest on small and large networks
_MASK_BYTES = 64 * 2**20  # of masks, and as much again of what the captured program makes of them


class TorchBackend:
    """A torch module with its draws as masks; safe to use from several threads at once."""

    def __init__(
        self,
        live: nn.Module,
        plain: nn.Module,
        pick: Pick,
        off: frozenset[str] = frozenset(),
        force: Callable[[str], bool] = nowhere,
        *,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        """Takes the shadow whose draws are on, the one with all of them off, and the names of sites left off.

        ``force`` says of a module path whether dropout calls that are switched off there drop all the same;
        ``precision`` is one of ``PRECISIONS``; ``compiled`` asks for torch's compiler.
        """
        self.live = live
        self.chunk_bytes = CHUNK_BYTES
        self.plain = plain
        self.pick = pick
        self.off = off
        self.force = force
        state = state_of(live)
        floating = next((one for one in state if one.now().is_floating_point()), None)
        self._telling = [one for one in (state[0] if state else None, floating) if one is not None]
        self._digest: tuple[object, str] | None = None
        self.precision = precision
        self.compiled = compiled
        self._plans: dict[object, Plan] = {}
        self._lock = threading.Lock()
        self._latest = threading.local()
        self._masks, self._values = Kept(_MASK_BYTES), Kept(_MASK_BYTES)
        # forwards of the shadows go one at a time: networks keep things on themselves while they run
        self.turn = threading.Lock()

    def block(self, rows: Rows, *, exact_last: bool = False) -> "_Ready":
        """Gives rows ready for passes with the weights of today, or for those with the last layer in closed form.

        Raises:
            InputError: the last layer has no closed form.
        """
        return _Ready(self, rows, exact_last=exact_last)

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...).

        Out of memory, half of the passes or of the rows are run at a time, and later chunks are half as large.
        """
        return self.block(rows).forward(passes, seed=seed, start=start, sampler=sampler)

    def deterministic(self, rows: Rows) -> NDArray[np.float32]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        try:
            _, tensors = self.prepare(rows)
            with torch.no_grad(), self.turn, _said_of(tensors):
                return _numpy(draws_off(self.plain, tensors, self.pick))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or rows.count == 1:
                raise
        return np.concatenate([self.deterministic(block) for block in rows.split(-(-rows.count // 2))])

    def widened(self, plan: Plan, tensors: Rows) -> Plan:
        """Gives a plan whose draws are as large as these rows ask for, and keeps it for later ones."""
        with self._lock, self.turn, _said_of(tensors):
            wide = replace(plan, trace=widened(plan.trace, trace(self.live, tensors, self.pick, self.force)))
            self._plans = {key: wide if kept is plan else kept for key, kept in self._plans.items()}
        return wide

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives hidden features with every draw off: (N, F), see ``hidden_features``."""
        _, tensors = self.prepare(rows)
        with self.turn:
            return _numpy(hidden_features(self.plain, tensors, self.pick, layer))

    def digest(self) -> str:
        """Gives a sha256 over the weights and the precision; hashed anew once torch counts a write to them (none through ``.data``)."""
        state = [*self.plain.parameters(), *self.plain.buffers()]
        stamp = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype) for tensor in state)
        known = self._digest
        if known is None or known[0] != stamp:
            digest = weights_digest(self.plain)
            if self.precision != "fp32":  # other passes, to whatever is bound to them
                digest = hashlib.sha256(f"{digest} {self.precision}".encode()).hexdigest()
            known = self._digest = (stamp, digest)
        return known[1]

    def run(
        self, rows: Rows, passes: int, *, only: str | None, tier: str | None = None, at_once: bool = False
    ) -> Tensor:
        """Gives some passes as they are on the device (T, N, ...), with one site alone drawing, or all of them.

        They are run in chunks, or ``at_once``.
        """
        plan, tensors = self.prepare(rows)
        chunk = passes if at_once else max(1, self.chunk_bytes // max(1, self.pass_bytes(rows) * rows.count))
        parts = []
        for start in range(0, passes, chunk):
            stacks = self.stacks(plan, Span(min(chunk, passes - start), 0, start, "iid"))
            if only is not None:
                sites = plan.trace.sites
                stacks = [stack if site.name == only else None for site, stack in zip(sites, stacks, strict=True)]
            with torch.no_grad():
                parts.append(self.through(plan, tensors, stacks, tier))
        return torch.cat(parts)

    def over(self, module: nn.Module) -> "TorchBackend":
        """Gives the same for a copy of the module: the same draws on, nothing traced yet."""
        live, plain = live_shadow(module, drawing=True), live_shadow(module)
        for ours, theirs in zip(self.live.modules(), live.modules(), strict=True):
            theirs.training = ours.training
        return TorchBackend(live, plain, self.pick, self.off, self.force, precision=self.precision)

    def each_pass(self, rows: Rows, passes: int, *, seed: int, start: int) -> None:
        """Runs passes one by one for what they do to the module, with the flags that its shadow has been given."""
        plan, tensors = self.prepare(rows)
        with torch.no_grad():
            stacks = self.stacks(plan, Span(passes, seed, start, "iid"))
            TIERS["loop"](self.live, tensors, self.pick, plan.trace, stacks)

    def watch(self, rows: Rows, mode: TorchFunctionMode, *, passes: int) -> None:
        """Runs passes one by one under a function mode that looks on; with no passes the deterministic forward."""
        plan, tensors = self.prepare(rows)
        with torch.no_grad(), mode:
            if passes == 0:
                draws_off(self.plain, tensors, self.pick)
                return
            stacks = self.stacks(plan, Span(passes, 0, 0, "iid"))
            TIERS["loop"](self.live, tensors, self.pick, plan.trace, stacks)

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs: some four of its largest results are alive at a time."""
        return 4 * self.plan(rows).trace.row_bytes

    def pass_bytes(self, rows: Rows) -> int:
        """Gives what a further pass of one row needs: what comes before the first draw is mostly not run again."""
        plan = self.plan(rows)
        return 4 * (plan.trace.pass_bytes if plan.tier in (CAPTURED, "vmap") else plan.trace.row_bytes)

    def tier(self, rows: Rows) -> tuple[str, str]:
        """Gives the tier that runs the passes of such rows, and why."""
        plan = self.plan(rows)
        return plan.tier, plan.reason

    def prepare(self, rows: Rows) -> tuple[Plan, Rows]:
        """Gives how passes of such rows are run, and the rows as tensors."""
        plan = self.plan(rows)
        if plan.program is not None and not plan.program.fits():
            with self._lock:
                self._plans.clear()
            plan = self.plan(rows)
        return plan, placed(rows, *self._place())

    def plan(self, rows: Rows) -> Plan:
        """Gives how passes of rows of such shapes are run; traced and checked when they are first seen."""
        place = self._place()
        latest = getattr(self._latest, "found", None)  # the engine asks several times of the same rows
        if latest is not None and latest[0]() is rows and latest[1] == place and latest[2] in self._plans.values():
            found: Plan = latest[2]
            return found
        signature = (*((name, leaf.shape[1:], leaf.dtype) for name, leaf in rows.named()), place)
        # where the rows' axis of a draw is not known, its mask belongs to this number of rows alone
        plan = self._plans.get(signature) or self._plans.get((signature, rows.count))
        if plan is None:
            with self._lock, self.turn:
                plan = self._plans.get(signature) or self._plans.get((signature, rows.count))
                if plan is None:
                    plan = self._make_plan(placed(rows, *place))
                    self._plans[(signature, rows.count) if plan.trace.unclear else signature] = plan
        self._latest.found = weakref.ref(rows), place, plan
        return plan

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the network is now, told by its first weight and its first floating one."""
        return place_of([tensor for one in self._telling if (tensor := one.tensors.get(one.name)) is not None])

    def _make_plan(self, tensors: Rows) -> Plan:
        with _said_of(tensors):
            found = trace(self.live, tensors, self.pick, self.force)

        def some(found: Trace, passes: int) -> Stacks:
            return self.stacks(Plan(found, self.off, "loop", ""), Span(passes, 0, 0, "iid"))

        with _said_of(tensors):
            return make_plan(
                self.live, self.plain, tensors, self.pick, found, self.off, some,
                precision=self.precision, compiled=self.compiled,
            )  # fmt: skip

    def stacks(self, plan: Plan, span: Span) -> Stacks:
        """Gives the masks of some passes, one stack a draw; None for draws that are left off."""
        device = self._place()[0]
        return [
            None
            if site.name in plan.off
            else self._masks.get((site, span, device), lambda site=site: stack(site, span, device))  # type: ignore[misc]
            for site in plan.trace.sites
        ]

    def values(self, plan: Plan, span: Span, *, ride: bool) -> Values:
        """Gives what a captured program makes of the masks of some passes."""
        key = (plan.program, span, ride)
        values: Values = self._values.get(key, lambda: plan.mask_values(self.stacks(plan, span), ride=ride))
        return values

    def through(self, plan: Plan, tensors: Rows, stacks: Stacks, tier: str | None = None) -> Tensor:
        """Runs the passes of given masks by a tier (None: the plan's); a draw whose stack is None is expected."""
        tier = tier or plan.tier
        whole = [stack is None for stack in stacks] == [site.name in plan.off for site in plan.trace.sites]
        if tier == CAPTURED and whole and plan.program is not None:
            present = [stack for stack in stacks if stack is not None]
            return straight(plan.program, plan.program.masks(present), tensors, len(present[0]))
        # a single pass has nothing to batch, and vmap's rules only cost
        single = all(stack is None or len(stack) == 1 for stack in stacks)
        run = TIERS["loop" if single else "vmap" if tier == CAPTURED else tier]
        return run(self.live, tensors, self.pick, plan.trace, stacks)


class _Ready:
    """Rows as tensors, and for a captured network what comes before its first draw."""

    def __init__(self, backend: TorchBackend, rows: Rows, *, exact_last: bool) -> None:
        self._backend, self._rows, self._exact_last = backend, rows, exact_last
        self._plan, self._tensors = backend.prepare(rows)
        if exact_last:
            if self._plan.exact is None:
                raise InputError(
                    "exact_last needs a captured network whose output is a linear layer straight after dropout; "
                    f"this one runs by {self._plan.tier!r} ({self._plan.reason})"
                )
            self._plan = replace(self._plan, program=self._plan.exact, rides=False)
        self._begun: tuple[Values, Values] | None = None
        self._off: NDArray[np.float32] | None = None

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        """Gives the outputs of some passes; out of memory, half of the passes or of the rows at a time."""
        try:
            return self._forward(Span(passes, seed, start, sampler))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or passes * self._rows.count == 1:
                raise
        self._backend.chunk_bytes = max(1, self._backend.chunk_bytes // 2)
        if passes > 1:
            half = passes // 2
            spans = [(start, half), (start + half, passes - half)]
            return np.concatenate([self.forward(n, seed=seed, start=at, sampler=sampler) for at, n in spans])
        again = partial(self._backend.block, exact_last=self._exact_last)
        parts = [again(part) for part in self._rows.split(-(-self._rows.count // 2))]
        return np.concatenate([part.forward(1, seed=seed, start=start, sampler=sampler) for part in parts], axis=1)

    def deterministic(self) -> NDArray[np.float32]:
        """Gives the outputs with every draw off; they are known where they rode along with the first passes."""
        return self._backend.deterministic(self._rows) if self._off is None else self._off

    def _forward(self, span: Span) -> NDArray[np.float32]:
        backend, plan = self._backend, self._plan
        program = plan.program
        if program is not None and program.holds(span.passes, self._rows.count):
            return self._captured(span)
        with torch.no_grad(), backend.turn, _said_of(self._tensors):
            try:
                return _numpy(backend.through(plan, self._tensors, backend.stacks(plan, span), _eager(plan)))
            except LargerDraw:
                pass
        self._plan = plan = backend.widened(plan, self._tensors)
        with torch.no_grad(), backend.turn, _said_of(self._tensors):
            return _numpy(backend.through(plan, self._tensors, backend.stacks(plan, span), _eager(plan)))

    def _captured(self, span: Span) -> NDArray[np.float32]:
        """Runs the program: it keeps nothing on itself, so other threads may run it meanwhile."""
        program, count = self._plan.program, self._rows.count
        assert program is not None
        ride = self._plan.rides and span.start == 0 and self._off is None
        with torch.no_grad(), _said_of(self._tensors):
            if self._begun is None:
                weights = program.weights()
                self._begun = weights, program.rows(weights, [leaf for _, leaf in self._tensors.named()], count)
            values = self._backend.values(self._plan, span, ride=ride)
            outputs = _numpy(program.passes(self._begun[0], values, self._begun[1], span.passes + ride, count))
        if ride:
            self._off = outputs[-1]
        return outputs[: span.passes]


def _eager(plan: Plan) -> str:
    """The tier where the network's code runs: that of a captured one is asked for with other sizes than it holds for."""
    return "vmap" if plan.tier == CAPTURED else plan.tier


@contextmanager
def _said_of(rows: Rows) -> Iterator[None]:
    """Turns a network's own error into one that says what it was given."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, InputError) or _out_of_memory(error):
            raise
        shapes = ", ".join(f"{name}: {tuple(leaf.shape)}" for name, leaf in rows.named())
        raise InputError(f"the network cannot take inputs of shape {shapes}: {first_line(error)}") from error


def _out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator only says so."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def _numpy(output: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = output.detach().to("cpu", torch.float32).numpy()
    return array
