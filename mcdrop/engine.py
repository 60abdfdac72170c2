"""Running T passes over N rows: in chunks, under a memory bound, with statistics gathered as the chunks come.

A row's answer depends on neither the chunk nor its neighbours, because the masks do not: cutting is free.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcdrop.backends import Backend
from mcdrop.errors import InputError, UnknownName
from mcdrop.masks import SAMPLERS, SEED_LIMIT
from mcdrop.moments import Moments
from mcdrop.rows import Rows

__all__ = ["MOST_PASSES", "PassPlan", "PassResult", "run_passes"]

MOST_PASSES = 1_000_000
_CHUNK_BYTES = 16 * 2**20  # what one chunk's activations may take: about a CPU's cache, where chunks run fastest

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class PassPlan:
    """Which passes to run. Requests with equal plans can share them.

    Raises:
        InputError: passes below 2 (a variance needs two) or above a million, or a seed outside 0 to 2**64 - 1.
    """

    passes: int = 100
    seed: int = 0
    sampler: str = "iid"
    keep_samples: bool = False

    def __post_init__(self) -> None:
        """Checks at the door."""
        if not _whole(self.passes) or not 2 <= self.passes <= MOST_PASSES:
            raise InputError(f"passes must be a whole number from 2 to {MOST_PASSES}, got {self.passes!r}")
        if not _whole(self.seed) or not 0 <= self.seed < SEED_LIMIT:
            raise InputError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        if self.sampler not in SAMPLERS:
            raise UnknownName("sampler", self.sampler, SAMPLERS)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class PassResult:
    """Moments over the passes of K statistics (N, ..., K), and the statistics themselves if kept (T, N, ..., K)."""

    moments: Moments
    samples: NDArray[np.float64] | None
    deterministic: NDArray[np.float64]
    plan: PassPlan


def run_passes(backend: Backend, rows: Rows, plan: PassPlan, *, statistic: Statistic) -> PassResult:
    """Runs a plan over all rows.

    ``statistic`` turns outputs (t, N, ...) into what is averaged over the passes, (t, N, ..., K). Memory follows the
    chunk, not the number of passes, unless samples are kept.
    """
    row_bytes = max(1, backend.row_bytes(rows))
    blocks = [_run_block(backend, block, plan, statistic, row_bytes) for block in rows.split(_block_size(row_bytes))]
    if len(blocks) == 1:
        return blocks[0]
    moments = Moments(
        plan.passes,
        np.concatenate([block.moments.mean for block in blocks]),
        np.concatenate([block.moments.squares for block in blocks]),
    )
    kept = [block.samples for block in blocks if block.samples is not None]
    samples = np.concatenate(kept, axis=1) if kept else None
    return PassResult(moments, samples, np.concatenate([block.deterministic for block in blocks]), plan)


def _block_size(row_bytes: int) -> int:
    return max(1, _CHUNK_BYTES // row_bytes)


def _run_block(backend: Backend, rows: Rows, plan: PassPlan, statistic: Statistic, row_bytes: int) -> PassResult:
    chunk = min(plan.passes, max(1, _CHUNK_BYTES // (row_bytes * rows.count)))
    moments: Moments | None = None
    kept = []
    for start in range(0, plan.passes, chunk):
        count = min(chunk, plan.passes - start)
        outputs = backend.forward(rows, count, seed=plan.seed, start=start, sampler=plan.sampler)
        values = statistic(outputs.astype(np.float64))
        piece = Moments.of(values)
        moments = piece if moments is None else moments.merge(piece)
        if plan.keep_samples:
            kept.append(values)
    assert moments is not None
    deterministic = statistic(backend.deterministic(rows).astype(np.float64)[None])[0]
    return PassResult(moments, np.concatenate(kept) if kept else None, deterministic, plan)
