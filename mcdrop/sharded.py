"""Several devices: one engine each, and the rows shared out between them.

A row's answer does not depend on its batch, so cutting a batch changes nothing. Each device holds a copy of the
network; before rows are run, the copies take over the weights that the network has today. Where these are of another
type or shape by now, or others are missing or shared, the copies are made anew.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mcdrop.backends import Block
from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ModelRefused
from mcdrop.forward import Outputs, moved
from mcdrop.moments import Summing
from mcdrop.rows import Rows
from mcdrop.shadow import copied
from mcdrop.standing import facts_of, kept_tensors, state_of
from mcdrop.volatile import volatile

__all__ = ["ShardedBackend"]


class ShardedBackend(TorchBackend):
    """A torch module on several devices; all but the running of rows is the first backend's."""

    def __init__(self, first: TorchBackend, devices: Sequence[str | torch.device]) -> None:
        """Takes a backend and the devices, on each of which a copy of its network is made.

        Raises:
            InputError: a device that is not there.
            ModelRefused: the network goes on from a list or dict, which a copy's hooks might not find.
        """
        lists = [name for name, start in volatile(first.live).items() if isinstance(start, list | dict)]
        if lists:
            raise ModelRefused(
                f"the network goes on from what its last forward left in {lists[0]}, and its copies on several devices "
                "might share that; run it on one device"
            )
        super().__init__(
            first.live, first.plain, first.pick, first.excluded, first.force, first.precision, first.compiled,
            first.plans.tuning, first.beside, flags=first.flags,
        )  # fmt: skip
        self.chunk_bytes, self.plans.seen = first.chunk_bytes, first.plans.seen
        self._places, self._turn = devices, threading.Lock()
        self._known: object = None  # of the weights that the copies were made with
        self._shards: list[TorchBackend] = []
        self._kept: list[list[Tensor]] = []  # beside the weights: the network's own, and those of each copy
        self._copies: list[nn.Module] = []
        self._take_over()
        self._pool = ThreadPoolExecutor(len(devices), thread_name_prefix="mcdrop-device")

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the rows are shared out to."""
        return tuple(device for shard in self._shards for device in shard.devices)

    def block(self, rows: Rows, *, exact_last: bool = False, rides: bool = True) -> Block:
        """Gives rows ready for passes, a part of them on each device."""
        shards = self._take_over()
        size = -(-rows.count // len(shards))
        parts = zip(shards, rows.split(size), strict=False)  # fewer rows than devices leave some without
        blocks = [shard.block(part, exact_last=exact_last, rides=rides) for shard, part in parts]
        return _Shards(blocks, self._pool)

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory a row needs; that of all devices is there for a block."""
        return max(1, super().row_bytes(rows) // len(self._shards))

    def _take_over(self) -> list[TorchBackend]:
        """Gives a backend for each device, with the numbers of today."""
        with self._turn, torch.no_grad():
            state = state_of(self.plain)  # which shares the weights of the user's network
            known = [one.name for one in state], facts_of([one.now() for one in state])
            if known != self._known:
                with torch.inference_mode(False):  # what is made in it could not be written to outside of it
                    copies = [moved(copied(self.plain), device) for device in self._places]
                    self._shards = [self.over(one) for one in copies]
                self._copies, self._known = copies, known
                self._kept = [[tensor for _, tensor in kept_tensors(one)] for one in (self.plain, *copies)]
            mine, *others = self._kept
            for one, theirs in zip(self._copies, others, strict=True):
                for tensor, today in zip([*_weights(one), *theirs], [*_weights(self.plain), *mine], strict=True):
                    tensor.copy_(today, non_blocking=True)
            return self._shards


def _weights(module: nn.Module) -> list[Tensor]:
    """The weights and buffers of a network in the order of its modules, shared ones as often as they stand there."""
    return [tensor for one in state_of(module) if (tensor := one.now()) is not None]


class _Shards:
    """Blocks that run at the same time, one a device."""

    def __init__(self, blocks: list[Any], pool: ThreadPoolExecutor) -> None:
        self._blocks, self._pool = blocks, pool

    @property
    def most(self) -> int:
        """How many passes of these rows should be run at a time."""
        most: int = min(one.most for one in self._blocks)
        return most

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> Outputs:
        """Gives the outputs of some passes (T, N, ...), rows in order."""
        asked = [
            self._pool.submit(one.forward, passes, seed=seed, start=start, sampler=sampler) for one in self._blocks
        ]
        return np.concatenate([one.result() for one in asked], axis=1)

    def sums_there(self, passes: int) -> bool:
        """Says no: each device has a part of the rows alone."""
        return False

    def summed(self, passes: int, *, seed: int, start: int, sampler: str, summing: Summing) -> None:
        """Gives None."""

    def deterministic(self) -> Outputs:
        """Gives the outputs with every draw off."""
        return np.concatenate([one.result() for one in [self._pool.submit(b.deterministic) for b in self._blocks]])
