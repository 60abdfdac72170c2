"""A plan: how the passes of one input signature are run, and the short measurements that its choices rest on."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mcdrop.effects import Verdict
from mcdrop.errors import InputError
from mcdrop.masks import Site
from mcdrop.program import Program, Values
from mcdrop.rows import Rows
from mcdrop.stacks import expected_stack
from mcdrop.tiers import Stacks
from mcdrop.trace import Trace, repeat_rows

__all__ = ["CAPTURED", "CHUNK_BYTES", "Plan", "Tuning", "calibrated", "straight"]

CAPTURED = "captured"
CHUNK_BYTES = 16 * 2**20  # about a CPU's cache; what a plan's ``chunk`` is a multiple of

_CHUNKS = (0.25, 4.0)  # tried beside the usual one
_CHUNK_ROWS = 32
_BESIDE = 1e-4  # seconds that a chunk costs beside its passes: its masks are found, its statistics gathered
_MOST_PASSES = 1000
_KEPT_ROWS = (16, 128)
_KEPT_PASSES = 3
_FEWEST_KEPT = 64
_TRIES, _MOST_TRIES = 4, 16
_SECONDS = 0.2  # more than the fewest tries are made within these
_MARGIN = 0.9  # what is faster on a machine with other work should be so clearly


@dataclass(frozen=True)
class Tuning:
    """What a short timing chose, once for a model; rounding follows it, so it is kept and saved with the model.

    ``chunk`` is the memory of a chunk of passes as a multiple of the usual, ``kept_from`` the number of rows from which
    passes compute with kept units alone.

    Raises:
        InputError: a choice that no timing makes.
    """

    chunk: float = 1.0
    kept_from: int | None = None

    def __post_init__(self) -> None:
        """Checks at the door: it may come out of a file."""
        if isinstance(self.chunk, bool) or self.chunk not in (1, *_CHUNKS):
            raise InputError(f"the chunk of a tuning is 1, {' or '.join(map(str, _CHUNKS))}, got {self.chunk!r}")
        if self.kept_from is not None and (type(self.kept_from) is not int or self.kept_from < 1):
            raise InputError(f"kept_from of a tuning is a whole number of rows above 0, got {self.kept_from!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Tuning":
        """Reads ``chunk`` and ``kept_from``; what is left out is as usual."""
        unknown = [name for name in given if name not in ("chunk", "kept_from")]
        if unknown:
            raise InputError(f"a tuning has chunk and kept_from, got {unknown[0]!r}")
        return cls(**given)


@dataclass(frozen=True, eq=False)
class Plan:
    """How passes of one input signature are run.

    ``program`` is the captured graph, or None. Where the output with all draws off ``rides`` along, it is one more pass
    at the masks' expectations, and costs next to nothing. ``exact`` gives mean and variance over the last mask in
    closed form, where there is one for it. ``kept`` computes with kept units alone, which is faster from ``kept_from``
    rows on. ``chunk`` is how many times the usual memory a chunk of passes takes where it is fastest. ``verdicts`` say
    which training flags are on where the network's own code is run; passes may add some.
    """

    trace: Trace
    off: frozenset[str]
    tier: str
    reason: str
    program: Program | None = None
    rides: bool = False
    exact: Program | None = None
    kept: Program | None = None
    kept_from: int | None = None
    chunk: float = 1.0
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def on(self) -> list[Site]:
        """The sites that draw."""
        return [site for site in self.trace.sites if site.name not in self.off]

    def today(self) -> list[Tensor] | None:
        """Gives the weights of today; None where there is no program, or they no longer fit it."""
        return None if self.program is None else self.program.today()

    def mask_values(self, stacks: Stacks, *, ride: bool) -> Values:
        """Gives what the program makes of masks (T, ...), with one more pass at their expectations at the end."""
        assert self.program is not None
        present = [stack for stack in stacks if stack is not None]
        values = self.program.masks(present)
        if not ride:
            return values
        expected = self.program.masks([expected_stack(site, present[0].device) for site in self.on])
        return self.program.more(values, expected)


def straight(program: Program, masks: Values, rows: Rows, passes: int) -> Tensor:
    """Runs a program from its weights to its outputs (T, N, ...)."""
    weights = program.weights()
    begun = program.rows(weights, rows.leaves, rows.count)
    return program.passes(weights, masks, begun, passes, rows.count)


def calibrated(plan: Plan, rows: Rows, stacks_of: Callable[[int], Stacks], tuning: Tuning | None) -> Plan:
    """Gives a captured plan with the choices of a tuning, or else those that a short timing makes here.

    It is for CPUs; a GPU takes what memory it has.
    """
    if tuning is not None:
        return replace(plan, chunk=tuning.chunk, kept_from=None if plan.kept is None else tuning.kept_from)
    if rows.leaves[0].device.type != "cpu":
        return plan
    with torch.no_grad():
        if plan.kept is not None:
            plan = replace(plan, kept_from=_kept_from(plan, rows, stacks_of(_KEPT_PASSES)))
        return replace(plan, chunk=_chunk(plan, rows, stacks_of))


def _kept_from(plan: Plan, rows: Rows, stacks: Stacks) -> int | None:
    """From how many rows on kept units are faster.

    Both ways are timed on two numbers of rows; gathering weights costs the same for each, the rest grows with them.
    """
    assert plan.program is not None
    assert plan.kept is not None
    few, many = _KEPT_ROWS
    ways = (plan.program, plan.kept)
    took = _shortest({(way, n): _run(way, repeat_rows(rows, n), stacks) for way in ways for n in _KEPT_ROWS})
    slope, kept_slope = ((took[one, many] - took[one, few]) / (many - few) for one in ways)
    gathering = took[plan.kept, few] - kept_slope * few
    gain = _MARGIN * slope - kept_slope
    if gain <= 0:
        return None
    return max(_FEWEST_KEPT, 1 << math.ceil(math.log2(max(gathering / gain, 1))))


def _chunk(plan: Plan, rows: Rows, stacks_of: Callable[[int], Stacks]) -> float:
    """How much memory a chunk should take, as a multiple of the usual, where that can be timed quickly."""
    assert plan.program is not None
    given = repeat_rows(rows, _CHUNK_ROWS)
    usual = CHUNK_BYTES // (4 * (plan.trace.pass_bytes * _CHUNK_ROWS + plan.trace.shared_bytes))
    if not 1 / min(_CHUNKS) <= usual <= _MOST_PASSES:  # too few to choose, or more than is ever asked for
        return 1.0
    once = _run(plan.program, given, stacks_of(usual))
    if once() * sum(_CHUNKS) * _TRIES > _SECONDS:
        return 1.0
    passes = {1.0: usual, **{chunk: int(usual * chunk) for chunk in _CHUNKS}}
    took = _shortest({chunk: _run(plan.program, given, stacks_of(count)) for chunk, count in passes.items()})
    pace = {chunk: (_BESIDE + took[chunk]) / count for chunk, count in passes.items()}
    pace[1.0] *= _MARGIN
    return min(pace, key=pace.__getitem__)


def _run(program: Program, rows: Rows, stacks: Stacks) -> Callable[[], float]:
    """Gives a function that runs the part which is run for every chunk of passes, and says how many seconds it took."""
    masks = [stack for stack in stacks if stack is not None]
    values, weights = program.masks(masks), program.weights()
    begun = program.rows(weights, rows.leaves, rows.count)

    def run() -> float:
        began = time.perf_counter()
        program.passes(weights, values, begun, len(masks[0]), rows.count)
        return time.perf_counter() - began

    return run


def _shortest(runs: Mapping[Any, Callable[[], float]]) -> dict[Any, float]:
    """The shortest time of each run, taken in turn: what else the machine does then meets all of them alike."""
    took: dict[Any, float] = dict.fromkeys(runs, math.inf)
    began = time.perf_counter()
    for tried in range(_MOST_TRIES):
        if tried >= _TRIES and time.perf_counter() - began > _SECONDS:
            break
        for name, run in runs.items():
            took[name] = min(took[name], run())
    return took
