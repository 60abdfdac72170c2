"""A way made ready for the clock: in its best mode, warm, and checked."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from benchmarks.throughput.check import ANSWER, Reference, pooled, verdict
from benchmarks.throughput.clock import Sample, sampled
from benchmarks.throughput.setting import Moments, Setting, Skipped
from benchmarks.throughput.ways import WAYS, Way, precision_of
from mcdrop.errors import MCDropError

__all__ = ["Ready", "prepared"]

SLOW = 1.0  # seconds of the plain loop above which the mode is chosen by a tenth of the passes
SHORT = 0.1  # seconds of a second run below which a third one tells how long later ones take: a GPU records the second
LONG = 5.0  # seconds of a first run above which a second one does not tell how long later ones take


@dataclass
class Ready:
    """A way that gives answers: how it runs, and what it cost before the first one."""

    name: str
    mode: str
    run: Callable[[int], object]
    prepare_ms: float
    first_ms: float
    seconds: float
    samples: list[Sample] = field(default_factory=list)


def prepared(name: str, setting: Setting, truth: Reference) -> Ready | str:
    """Gives a way in its best mode, or why it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check tells what is wrong with a way
            ready, found, runs = _warmed(name, setting, truth)
    except (Skipped, MCDropError) as why:
        return f"skipped: {why}"
    except Exception as error:  # that a way fails here is a finding, not the end of the benchmark
        sentence = " ".join(str(error).split()).partition(". ")[0]
        return f"failed: {type(error).__name__}: {sentence[:120]}"
    judged = verdict(found, runs * setting.passes, truth, precision_of(name))
    return ready if judged == ANSWER else judged


def _warmed(name: str, setting: Setting, truth: Reference) -> tuple[Ready, Moments, int]:
    """Gives the way, the pooled moments of its first runs, and how many of them there were."""
    began = time.perf_counter()
    modes = WAYS[name](setting)
    prepare_ms = (time.perf_counter() - began) * 1e3
    mode = next(iter(modes))
    if len(modes) > 1:
        slow = truth.pass_seconds * setting.passes > SLOW
        trial = replace(setting, passes=max(2, setting.passes // 10)) if slow else setting
        mode = _fastest(WAYS[name], trial, list(modes))
    run, first = modes[mode], list[Moments]()
    seconds = first_seconds = sampled(lambda: first.append(run(0))).seconds
    if seconds < LONG:
        seconds = sampled(lambda: run(0)).seconds
    if seconds < SHORT:
        seconds = sampled(lambda: run(0)).seconds
    found, runs = pooled(run, first[0], seconds)
    if runs > 1:  # what is kept for the seed that is timed may have made room for that of others
        run(0)
    return Ready(name, mode, run, prepare_ms, first_seconds * 1e3, seconds), found, runs


def _fastest(way: Way, trial: Setting, names: list[str]) -> str:
    """Gives the mode whose second run is shortest."""
    modes = way(trial)

    def seconds(mode: str) -> float:
        return min(sampled(lambda: modes[mode](0)).seconds for _ in range(2))

    return min(names, key=seconds)
