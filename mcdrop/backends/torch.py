"""Passes of a torch module: masks from ``masks``, the module's live shadow, and a verified tier to run them."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.backends import Block
from mcdrop.digits import digits
from mcdrop.features import beside_weights, hidden_features, tensors_digest, weights_digest
from mcdrop.flags import Flags
from mcdrop.forward import Outputs, as_numpy, draws_off, place_of
from mcdrop.intercept import EachRow, Given
from mcdrop.masks import Site
from mcdrop.moments import Summing
from mcdrop.outputs import Pick
from mcdrop.plan import CHUNK_BYTES, Plan, Tuning
from mcdrop.plans import Plans
from mcdrop.ready import Ready, Room
from mcdrop.record import extreme, nowhere
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.stacks import Span
from mcdrop.tiers import Stacks
from mcdrop.trace import one_pass
from mcdrop.volatile import own, placed_starts

__all__ = ["TorchBackend"]


class TorchBackend:
    """A torch module with its draws as masks; safe to use from several threads at once."""

    def __init__(
        self,
        live: nn.Module,
        plain: nn.Module,
        pick: Pick,
        excluded: frozenset[str] = frozenset(),
        force: Callable[[str], bool] = nowhere,
        precision: str = "fp32",
        compiled: bool = False,
        tuning: Tuning | None = None,
        beside: bool = False,
        *,
        flags: Flags,
    ) -> None:
        """Takes the shadow whose draws are on, the one with all of them off, and the modules whose draws stay off.

        ``force`` says of a module path whether dropout calls that are switched off there drop all the same;
        ``precision`` is one of ``PRECISIONS``; ``compiled`` asks for torch's compiler,
        ``tuning`` holds choices that were timed before. A single row is run ``beside`` itself where it has to be.
        ``flags`` are those of the first shadow, to be looked at again where other rows read others.
        """
        self.live, self.plain, self.pick, self.excluded, self.force = live, plain, pick, excluded, force
        self.precision, self.compiled, self.beside = precision, compiled, beside
        self.room = Room(_room(live))
        self.flags = flags
        self.plans = Plans(
            live, plain, pick, excluded, force, precision=precision, compiled=compiled, tuning=tuning, flags=flags
        )
        self._digest: tuple[object, str] | None = None
        self._others = beside_weights(plain)
        self._others_before = tensors_digest(self._others)

    @property
    def devices(self) -> tuple[str, ...]:
        """The device that the network is on."""
        return (str(_device(self.live)),)

    @property
    def chunk_bytes(self) -> int:
        """What the activations of one chunk of passes may take."""
        return self.room.bytes

    @chunk_bytes.setter
    def chunk_bytes(self, given: int) -> None:
        self.room.bytes = given

    def block(self, rows: Rows, *, exact_last: bool = False, rides: bool = True) -> Block:
        """Gives rows ready for passes with the weights of today, or for those with the last layer in closed form.

        Raises:
            InputError: the last layer has no closed form.
        """
        several = self._several(rows)
        ready = Ready(self.plans, several, self.room, exact_last=exact_last, rides=rides)
        return ready if several is rows else _Single(ready)

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> Outputs:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...).

        Out of memory, half of the passes or of the rows are run at a time, and later chunks are half as large.
        """
        return self.block(rows, rides=False).forward(passes, seed=seed, start=start, sampler=sampler)

    def deterministic(self, rows: Rows) -> Outputs:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        return self.plans.deterministic(self._several(rows))[: rows.count]

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives hidden features with every draw off: (N, F), see ``hidden_features``."""
        _, tensors = self.plans.prepare(self._several(rows))
        with self.plans.turn, self.plans.arithmetic(tensors):
            found = as_numpy(hidden_features(self.plain, tensors, self.pick, layer))
        return found[: rows.count].astype(np.float32, copy=False)

    def digest(self) -> str:
        """Gives a sha256 over the weights and the precision, and over other tensors once these have changed.

        It is taken anew once torch counts a write to them, which it does not through ``.data``.
        """
        state = [*self.plain.parameters(), *self.plain.buffers(), *self._others.values()]
        stamp = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype) for tensor in state)
        known = self._digest
        if known is None or known[0] != stamp:
            digest = weights_digest(self.plain)
            if self.precision != "fp32":  # other passes, to whatever is bound to them
                digest = hashlib.sha256(f"{digest} {self.precision}".encode()).hexdigest()
            others = tensors_digest(beside_weights(self.plain))
            if others != self._others_before:  # a saved network may name them otherwise
                digest = hashlib.sha256(f"{digest} {others}".encode()).hexdigest()
            known = self._digest = (stamp, digest)
        return known[1]

    def run(
        self,
        rows: Rows,
        passes: int,
        *,
        only: str | None,
        tier: str | None = None,
        at_once: bool = False,
        start: int = 0,
    ) -> Tensor:
        """Gives passes from ``start`` on as they are on the device (T, N, ...), with one site alone drawing, or all.

        They are run in chunks, or ``at_once``.
        """
        plan, tensors = self.plans.prepare(rows)
        needed = self.pass_bytes(rows) * rows.count + self.shared_bytes(rows)
        chunk = passes if at_once else max(1, self.chunk_bytes // needed)
        parts = []
        for done in range(0, passes, chunk):
            stacks = self.plans.stacks(plan, Span(min(chunk, passes - done), 0, start + done, "iid"))
            if only is not None:
                sites = plan.trace.sites
                stacks = [stack if site.name == only else None for site, stack in zip(sites, stacks, strict=True)]
            # a tier that is asked for is what others are compared with: with all digits
            precise = self.plans.arithmetic(tensors) if tier is None else digits(tensors.leaves[0].device)
            with torch.no_grad(), self.plans.turn, precise:
                parts.append(self.plans.through(plan, tensors, stacks, tier))
        return torch.cat(parts)

    def over(self, module: nn.Module) -> "TorchBackend":
        """Gives the same for a copy of the module: the same draws on, as they were found when it was wrapped."""
        live, plain = live_shadow(module, drawing=True), live_shadow(module)
        own((live, plain), placed_starts(self.live, _device(module)))
        other = TorchBackend(
            live, plain, self.pick, self.excluded, self.force, self.precision, self.compiled, self.plans.tuning,
            self.beside, flags=self.flags.over(live),
        )  # fmt: skip
        if self.plans.seen is not None:
            other.plans.knows(*self.plans.seen)
        if self.room.given:
            other.chunk_bytes = self.chunk_bytes
        return other

    def apart(self) -> "TorchBackend":
        """Gives the same over the same tensors in dicts of its own, where torch puts others while it exports."""
        module = live_shadow(self.plain)
        for child in module.modules():
            child.__dict__.update({name: {**vars(child)[name]} for name in ("_parameters", "_buffers")})
        return self.over(module)

    def each_row(
        self, rows: Rows, *, seed: int, start: int, watching: AbstractContextManager[object] | None = None
    ) -> None:
        """Runs a pass in which every row has masks of its own, as in training, for what it does to the module.

        The masks are those of passes ``start`` to ``start + N``; what all rows share, such as a weight's, is the
        first of them. Flags are those that the shadow has been given.
        """
        plan, tensors = self.plans.prepare(rows)
        draws = zip(plan.trace.sites, plan.trace.layouts, strict=True)
        shared = frozenset(site.name for site, layout in draws if layout is None)
        own = self.plans.stacks(replace(plan, off=plan.off | shared), Span(rows.count, seed, start, "iid"))
        first = self.plans.stacks(plan, Span(1, seed, start, "iid"))
        masks = [once if each is None else each for each, once in zip(own, first, strict=True)]
        self._one_pass(plan, tensors, masks, EachRow, watching or nullcontext())

    def first_pass(self, rows: Rows, mode: TorchFunctionMode, *, at: int | None = None) -> None:
        """Runs a pass under a function mode that looks on, ``at`` an extreme of its numbers where that is given."""
        plan, tensors = self.plans.prepare(rows)
        masks = [None if stack is None else stack[0] for stack in self.plans.stacks(plan, Span(1, 0, 0, "iid"))]
        if at is not None:
            pairs = zip(plan.trace.sites, masks, strict=True)
            masks = [None if mask is None else torch.full_like(mask, extreme(site.kind, at)) for site, mask in pairs]
        self._one_pass(plan, tensors, masks, Given, mode)

    def _one_pass(
        self, plan: Plan, tensors: Rows, masks: Stacks, source: type[Given], watching: AbstractContextManager[object]
    ) -> None:
        exact, flags = self.plans.arithmetic(tensors), self.flags.under(plan.verdicts)
        with torch.no_grad(), self.plans.turn, exact, watching, flags:  # the turn first, as everywhere
            one_pass(self.live, tensors, self.pick, plan.trace, masks, source)

    def watch(self, rows: Rows, mode: TorchFunctionMode) -> None:
        """Runs the forward with every draw off under a function mode that looks on."""
        _, tensors = self.plans.prepare(rows)
        with torch.no_grad(), self.plans.arithmetic(tensors), mode:
            draws_off(self.plain, tensors, self.pick)

    def plan(self, rows: Rows) -> Plan:
        """Gives how passes of such rows are run."""
        return self.plans.plan(self._several(rows))

    def sites(self, rows: Rows) -> list[Site]:
        """Gives the draws of a pass that are on."""
        return self.plan(rows).on

    def _several(self, rows: Rows) -> Rows:
        """Puts a single row beside itself, where the network takes none that is alone."""
        return rows.take([0, 0]) if self.beside and rows.count == 1 else rows

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs: some four of its largest results are alive at a time."""
        return 4 * self.plan(rows).trace.row_bytes

    def pass_bytes(self, rows: Rows) -> int:
        """Gives what a further pass of one row needs: what comes before the first draw is mostly not run again."""
        return self.room.pass_bytes(self.plan(rows))

    def shared_bytes(self, rows: Rows) -> int:
        """Gives what a further pass needs besides, for all rows together."""
        return self.room.shared_bytes(self.plan(rows))

    def tier(self, rows: Rows) -> tuple[str, str]:
        """Gives the tier that runs the passes of such rows, and why."""
        plan = self.plan(rows)
        return plan.tier, plan.reason


@dataclass(frozen=True)
class _Single:
    """A block of one row beside itself, with the answers of one."""

    pair: Ready

    @property
    def most(self) -> int:
        """How many passes should be run at a time."""
        return self.pair.most

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> Outputs:
        """Gives the outputs of some passes."""
        return self.pair.forward(passes, seed=seed, start=start, sampler=sampler)[:, :1]

    def sums_there(self, passes: int) -> bool:
        """Says no: sums would be those of two rows."""
        return False

    def summed(self, passes: int, *, seed: int, start: int, sampler: str, summing: Summing) -> None:
        """Gives None."""

    def deterministic(self) -> Outputs:
        """Gives the outputs with every draw off."""
        return self.pair.deterministic()[:1]


def _room(module: nn.Module) -> int:
    """What the activations of a chunk may take: about a cache on a CPU, an eighth of what is free on a GPU."""
    device = _device(module)
    return torch.cuda.mem_get_info(device)[0] // 8 if device.type == "cuda" else CHUNK_BYTES


def _device(module: nn.Module) -> torch.device:
    device, _ = place_of([*module.parameters(), *module.buffers()])
    return device
