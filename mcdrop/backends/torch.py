"""Passes of a torch module: masks from ``masks``, the module's live shadow, and a verified way to run them.

A *tier* is a way to run several passes; all get the same masks. ``vmap`` batches over the passes, so what comes before
the first mask runs once; ``fold`` repeats the rows; ``loop`` runs pass after pass and is what the others are checked
against. To add a tier, add one function and one line to ``TIERS``.
"""

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.errors import InputError
from mcdrop.features import hidden_features, weights_digest
from mcdrop.forward import VOLATILE, draws_off, to_tensors
from mcdrop.intercept import Folded
from mcdrop.masks import Site, sample_masks
from mcdrop.outputs import Pick
from mcdrop.record import nowhere
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.trace import Trace, one_pass, trace

__all__ = ["TIERS", "TorchBackend"]

Stacks = list[Tensor | None]  # for each draw its masks (T, *unit), or None for its expectation

CHUNK_BYTES = 16 * 2**20  # about a CPU's cache: chunks of 8 to 32 MiB ran fastest on small and large networks
_MASK_CACHE_BYTES = 64 * 2**20
_CHECK_PASSES = 3


def _loop(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = next(len(stack) for stack in stacks if stack is not None)
    each = ([None if stack is None else stack[t] for stack in stacks] for t in range(passes))
    return torch.stack([one_pass(module, rows, pick, found, masks) for masks in each])


def _vmap(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    present = [stack for stack in stacks if stack is not None]

    def one(*masks: Tensor) -> Tensor:
        left = iter(masks)
        return one_pass(module, rows, pick, found, [None if stack is None else next(left) for stack in stacks])

    output: Tensor = torch.vmap(one, randomness="error")(*present)
    return output


def _fold(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> Tensor:
    passes = next(len(stack) for stack in stacks if stack is not None)
    copies = rows.map(lambda leaf: leaf.repeat(passes, *(1,) * (leaf.dim() - 1)))
    output = one_pass(module, copies, pick, found, stacks, Folded)
    return output.reshape(passes, rows.count, *output.shape[1:])


TIERS: dict[str, Callable[[nn.Module, Rows, Pick, Trace, Stacks], Tensor]] = {
    "fold": _fold,
    "loop": _loop,
    "vmap": _vmap,
}


@dataclass(frozen=True)
class _Plan:
    """How passes of one input signature are run."""

    trace: Trace
    off: frozenset[str]
    tier: str
    reason: str


@dataclass
class _MaskCache:
    """Masks on the device, the latest used first, bounded in bytes."""

    held: OrderedDict[object, Tensor] = field(default_factory=OrderedDict)
    size: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        mask = make()
        with self.lock:
            if key not in self.held:
                self.held[key] = mask
                self.size += mask.nbytes
            while self.size > _MASK_CACHE_BYTES:
                self.size -= self.held.popitem(last=False)[1].nbytes
        return mask


class TorchBackend:
    """A torch module with its draws as masks; safe to use from several threads at once."""

    def __init__(
        self,
        live: nn.Module,
        plain: nn.Module,
        pick: Pick,
        off: frozenset[str] = frozenset(),
        force: Callable[[str], bool] = nowhere,
    ) -> None:
        """Takes the shadow whose draws are on, the one with all of them off, and the names of sites left off.

        ``force`` says of a module path whether dropout calls that are switched off there drop all the same.
        """
        self.live = live
        self.chunk_bytes = CHUNK_BYTES
        self.plain = plain
        self.pick = pick
        self.off = off
        self.force = force
        self._plans: dict[object, _Plan] = {}
        self._lock = threading.Lock()
        self._cache = _MaskCache()
        # passes that write to buffers of the shadow go one at a time
        self._turn = threading.Lock() if VOLATILE in vars(live) else nullcontext()

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...)."""
        plan, tensors = self._prepare(rows)
        stacks = self._stacks(plan, passes, seed, start, sampler)
        with torch.no_grad(), self._turn:
            output = TIERS[plan.tier](self.live, tensors, self.pick, plan.trace, stacks)
        return _numpy(output)

    def deterministic(self, rows: Rows) -> NDArray[np.float32]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        _, tensors = self._prepare(rows)
        with torch.no_grad(), self._turn:
            return _numpy(draws_off(self.plain, tensors, self.pick))

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives hidden features with every draw off: (N, F), see ``hidden_features``."""
        _, tensors = self._prepare(rows)
        return _numpy(hidden_features(self.plain, tensors, self.pick, layer))

    def digest(self) -> str:
        """Gives a sha256 over the weights."""
        return weights_digest(self.plain)

    def run(self, rows: Rows, passes: int, *, only: str | None, tier: str | None = None) -> Tensor:
        """Gives some passes as they are on the device, with one site alone drawing, or all of them (T, N, ...)."""
        plan, tensors = self._prepare(rows)
        stacks = self._stacks(plan, passes, seed=0, start=0, sampler="iid")
        if only is not None:
            sites = plan.trace.sites
            stacks = [stack if site.name == only else None for site, stack in zip(sites, stacks, strict=True)]
        with torch.no_grad():
            return TIERS[tier or plan.tier](self.live, tensors, self.pick, plan.trace, stacks)

    def over(self, module: nn.Module) -> "TorchBackend":
        """Gives the same for a copy of the module: the same draws on, nothing traced yet."""
        live, plain = live_shadow(module, drawing=True), live_shadow(module)
        for ours, theirs in zip(self.live.modules(), live.modules(), strict=True):
            theirs.training = ours.training
        return TorchBackend(live, plain, self.pick, self.off, self.force)

    def each_pass(self, rows: Rows, passes: int, *, seed: int, start: int) -> None:
        """Runs passes one by one for what they do to the module, with the flags that its shadow has been given."""
        plan, tensors = self._prepare(rows)
        with torch.no_grad():
            _loop(self.live, tensors, self.pick, plan.trace, self._stacks(plan, passes, seed, start, "iid"))

    def watch(self, rows: Rows, mode: TorchFunctionMode, *, passes: int) -> None:
        """Runs passes one by one under a function mode that looks on; with no passes the deterministic forward."""
        plan, tensors = self._prepare(rows)
        with torch.no_grad(), mode:
            if passes == 0:
                draws_off(self.plain, tensors, self.pick)
                return
            stacks = self._stacks(plan, passes, seed=0, start=0, sampler="iid")
            _loop(self.live, tensors, self.pick, plan.trace, stacks)

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs: some four of its largest results are alive at a time."""
        return 4 * self._prepare(rows)[0].trace.row_bytes

    def tier(self, rows: Rows) -> tuple[str, str]:
        """Gives the tier that runs the passes of such rows, and why."""
        plan = self._prepare(rows)[0]
        return plan.tier, plan.reason

    def _prepare(self, rows: Rows) -> tuple[_Plan, Rows]:
        tensors = to_tensors(rows, self.live)
        signature = tuple((name, tuple(leaf.shape[1:]), leaf.dtype, leaf.device) for name, leaf in tensors.named())
        # where the rows' axis of a draw is not known, its mask belongs to this number of rows alone
        plan = self._plans.get(signature) or self._plans.get((signature, tensors.count))
        if plan is None:
            with self._lock, self._turn:
                plan = self._plans.get(signature) or self._plans.get((signature, tensors.count))
                if plan is None:
                    plan = self._make_plan(tensors)
                    self._plans[(signature, tensors.count) if plan.trace.unclear else signature] = plan
        return plan, tensors

    def _make_plan(self, tensors: Rows) -> _Plan:
        shapes = ", ".join(f"{name}: {('N', *leaf.shape[1:])}" for name, leaf in tensors.named())
        try:
            found = trace(self.live, tensors, self.pick, self.force)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the network cannot take inputs of shape {shapes}: {_first_line(error)}") from error
        few = tensors if found.unclear else tensors.take(slice(0, min(tensors.count, 4)))
        plan = _Plan(found, self.off, "loop", "")
        stacks = self._stacks(plan, _CHECK_PASSES, seed=0, start=0, sampler="iid")
        tier, reason = _choose(self.live, few, self.pick, found, stacks)
        return _Plan(found, self.off, tier, reason)

    def _stacks(self, plan: _Plan, passes: int, seed: int, start: int, sampler: str) -> Stacks:
        device = next((t.device for t in (*self.live.parameters(), *self.live.buffers())), torch.device("cpu"))
        stacks: Stacks = []
        for site in plan.trace.sites:
            if site.name in plan.off:
                stacks.append(None)
                continue

            def make(site: Site = site) -> Tensor:
                masks = sample_masks([site], passes, seed=seed, start=start, sampler=sampler)
                return torch.as_tensor(np.asarray(masks[site.name])).to(device)

            stacks.append(self._cache.get((site, passes, seed, start, sampler, device), make))
        return stacks


def _choose(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Stacks) -> tuple[str, str]:
    """Gives the tier to use and why: vmap where it equals the loop on the same masks, else the faster of the rest."""
    if VOLATILE in vars(module):
        return "loop", "the network writes to buffers of its own in every pass"
    seconds, reasons = {}, []
    with torch.no_grad(), warnings.catch_warnings():
        # where torch only loops inside vmap, nothing is gained, and users would see its warning
        warnings.filterwarnings("error", message=".*performance drop.*")
        expected, seconds["loop"] = _timed(TIERS["loop"], module, rows, pick, found, stacks)
        for tier in ("vmap", "fold"):
            try:
                got, seconds[tier] = _timed(TIERS[tier], module, rows, pick, found, stacks)
            except Exception as error:  # whatever a network does there, the loop is right
                reasons.append(f"{tier} does not take this network: {_first_line(error)}")
                continue
            worst = _difference(got, expected)
            if worst > _tolerance(expected.dtype):
                del seconds[tier]
                reasons.append(f"{tier} differs from the loop by {worst:.1e}")
            elif tier == "vmap":
                return tier, "equals the loop; what comes before the first draw is run once"
    best = min(seconds, key=lambda tier: seconds[tier])
    agrees = "equals the loop" if best == "fold" else "the way that the others are checked against"
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


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), 1e-30)
    return float((got - expected).abs().max()) / scale


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding of a few hundred operations in a type: 3e-5 in float32, 2e-2 in bfloat16."""
    return {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 1e-2}.get(dtype, 2e-2)


def _numpy(output: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = output.detach().to("cpu", torch.float32).numpy()
    return array


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
