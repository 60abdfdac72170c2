"""Passes of a torch module: masks from ``masks``, the module's live shadow, and a verified tier to run them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.errors import InputError
from mcdrop.features import hidden_features, weights_digest
from mcdrop.forward import draws_off, to_tensors
from mcdrop.intercept import LargerDraw
from mcdrop.masks import Site, sample_masks
from mcdrop.outputs import Pick
from mcdrop.record import nowhere
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.tiers import CHECK_PASSES, TIERS, Stacks, choose_tier, first_line
from mcdrop.trace import Trace, trace, widened

__all__ = ["TorchBackend"]


CHUNK_BYTES = 16 * 2**20  # about a CPU's cache: chunks of 8 to 32 MiB ran fastest on small and large networks
_MASK_CACHE_BYTES = 64 * 2**20


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
        self._digest: tuple[object, str] | None = None
        self._plans: dict[object, _Plan] = {}
        self._lock = threading.Lock()
        self._cache = _MaskCache()
        # forwards of the shadows go one at a time: networks keep things on themselves while they run
        self._turn = threading.Lock()

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...).

        Out of memory, half of the passes or of the rows are run at a time, and later chunks are half as large.
        """
        try:
            return self._forward(rows, passes, seed, start, sampler)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or passes * rows.count == 1:
                raise
        self.chunk_bytes = max(1, self.chunk_bytes // 2)
        if passes > 1:
            half = passes // 2
            spans = [(start, half), (start + half, passes - half)]
            return np.concatenate([self.forward(rows, n, seed=seed, start=at, sampler=sampler) for at, n in spans])
        blocks = rows.split(-(-rows.count // 2))
        return np.concatenate([self.forward(b, 1, seed=seed, start=start, sampler=sampler) for b in blocks], axis=1)

    def _forward(self, rows: Rows, passes: int, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        plan, tensors = self._prepare(rows)
        try:
            return self._through(plan, tensors, self._stacks(plan, passes, seed, start, sampler))
        except LargerDraw:
            plan = self._widened(plan, tensors)
        return self._through(plan, tensors, self._stacks(plan, passes, seed, start, sampler))

    def _through(self, plan: _Plan, tensors: Rows, stacks: Stacks) -> NDArray[np.float32]:
        # a single pass has nothing to batch, and vmap's rules only cost
        single = all(stack is None or len(stack) == 1 for stack in stacks)
        run = TIERS["loop" if single else plan.tier]
        with torch.no_grad(), self._turn, _said_of(tensors):
            return _numpy(run(self.live, tensors, self.pick, plan.trace, stacks))

    def _widened(self, plan: _Plan, tensors: Rows) -> _Plan:
        """Gives a plan whose draws are as large as these rows ask for, and keeps it for later ones."""
        with self._lock, self._turn, _said_of(tensors):
            wide = replace(plan, trace=widened(plan.trace, trace(self.live, tensors, self.pick, self.force)))
            self._plans = {key: wide if kept is plan else kept for key, kept in self._plans.items()}
        return wide

    def deterministic(self, rows: Rows) -> NDArray[np.float32]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        try:
            _, tensors = self._prepare(rows)
            with torch.no_grad(), self._turn, _said_of(tensors):
                return _numpy(draws_off(self.plain, tensors, self.pick))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or rows.count == 1:
                raise
        return np.concatenate([self.deterministic(block) for block in rows.split(-(-rows.count // 2))])

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives hidden features with every draw off: (N, F), see ``hidden_features``."""
        _, tensors = self._prepare(rows)
        with self._turn:
            return _numpy(hidden_features(self.plain, tensors, self.pick, layer))

    def digest(self) -> str:
        """Gives a sha256 over the weights; hashed anew once torch counts a write to them (none through ``.data``)."""
        state = [*self.plain.parameters(), *self.plain.buffers()]
        stamp = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype) for tensor in state)
        known = self._digest
        if known is None or known[0] != stamp:
            known = self._digest = (stamp, weights_digest(self.plain))
        return known[1]

    def run(
        self, rows: Rows, passes: int, *, only: str | None, tier: str | None = None, at_once: bool = False
    ) -> Tensor:
        """Gives some passes as they are on the device (T, N, ...), with one site alone drawing, or all of them.

        They are run in chunks, or ``at_once``.
        """
        plan, tensors = self._prepare(rows)
        chunk = passes if at_once else max(1, self.chunk_bytes // max(1, self.pass_bytes(rows) * rows.count))
        parts = []
        for start in range(0, passes, chunk):
            stacks = self._stacks(plan, min(chunk, passes - start), seed=0, start=start, sampler="iid")
            if only is not None:
                sites = plan.trace.sites
                stacks = [stack if site.name == only else None for site, stack in zip(sites, stacks, strict=True)]
            with torch.no_grad():
                parts.append(TIERS[tier or plan.tier](self.live, tensors, self.pick, plan.trace, stacks))
        return torch.cat(parts)

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
            TIERS["loop"](self.live, tensors, self.pick, plan.trace, self._stacks(plan, passes, seed, start, "iid"))

    def watch(self, rows: Rows, mode: TorchFunctionMode, *, passes: int) -> None:
        """Runs passes one by one under a function mode that looks on; with no passes the deterministic forward."""
        plan, tensors = self._prepare(rows)
        with torch.no_grad(), mode:
            if passes == 0:
                draws_off(self.plain, tensors, self.pick)
                return
            stacks = self._stacks(plan, passes, seed=0, start=0, sampler="iid")
            TIERS["loop"](self.live, tensors, self.pick, plan.trace, stacks)

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs: some four of its largest results are alive at a time."""
        return 4 * self._prepare(rows)[0].trace.row_bytes

    def pass_bytes(self, rows: Rows) -> int:
        """Gives what a further pass of one row needs: what comes before the first draw is not run again under vmap."""
        plan = self._prepare(rows)[0]
        return 4 * (plan.trace.pass_bytes if plan.tier == "vmap" else plan.trace.row_bytes)

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
        with _said_of(tensors):
            found = trace(self.live, tensors, self.pick, self.force)
        few = tensors if found.unclear else tensors.take(slice(0, min(tensors.count, 4)))
        plan = _Plan(found, self.off, "loop", "")
        stacks = self._stacks(plan, CHECK_PASSES, seed=0, start=0, sampler="iid")
        with _said_of(few):
            tier, reason = choose_tier(self.live, few, self.pick, found, stacks)
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
