"""Times with what the neighbours did meanwhile, and ratios within a round.

A neighbour on one of two cores makes parallel code several times slower. So each sample says which share of all cores
other processes used while it ran, and where there are enough samples without a neighbour the others are left out.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["CLEAN", "Sample", "clean", "median_ms", "ratio", "sampled"]

CLEAN = 0.12  # of all cores
_ENOUGH = 3
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Sample:
    """Seconds of one run, and the share of all cores that others used meanwhile."""

    seconds: float
    busy: float


def _used() -> float:
    """Seconds that all cores have worked since the start of the machine; 0 where it does not say."""
    if not _STAT.is_file():
        return 0.0
    user, nice, system, _idle, _wait, *rest = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def sampled(run: Callable[[], object], repeats: int = 1) -> Sample:
    """Times a number of runs as one; a short one needs several, because the machine counts in hundredths."""
    used, own = _used(), time.process_time()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    others = (_used() - used) - (time.process_time() - own)
    return Sample(seconds / repeats, max(0.0, others / seconds / (os.cpu_count() or 1)))


def clean(samples: Sequence[Sample]) -> list[Sample]:
    """Gives the samples without a neighbour where there are enough of them, else all."""
    quiet = [sample for sample in samples if sample.busy < CLEAN]
    return quiet if len(quiet) >= _ENOUGH else list(samples)


def median_ms(samples: Sequence[Sample]) -> float:
    """Gives the median of the clean samples in milliseconds."""
    return statistics.median(sample.seconds for sample in clean(samples)) * 1e3


def ratio(theirs: Sequence[Sample], ours: Sequence[Sample]) -> float:
    """Gives how many times longer theirs take: the median over the rounds that both ran in, clean ones first."""
    rounds = [
        Sample(one.seconds / other.seconds, max(one.busy, other.busy))
        for one, other in zip(theirs, ours, strict=False)  # a slow way runs in the first rounds only
    ]
    return statistics.median(sample.seconds for sample in clean(rounds))
