"""Rows that are ready for passes: as tensors, and for a captured network with what comes before its first draw."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcdrop.errors import InputError
from mcdrop.forward import Outputs, as_numpy, out_of_memory, said_of
from mcdrop.intercept import LargerDraw
from mcdrop.moments import Summing
from mcdrop.plan import CAPTURED, Plan, straight
from mcdrop.plans import Plans
from mcdrop.program import Program, Values
from mcdrop.replay import Finish, Played
from mcdrop.rows import Rows
from mcdrop.stacks import Span
from mcdrop.sums import summed_up

__all__ = ["Ready", "Room"]

_MANY = 3000  # outputs: fewer take less time to move, and to sum up here
_SUMMING = 13 * 4  # bytes for each output, where classes are told by float64: probabilities, votes, differences
_SMALL = 4  # times a small run fits into what there is


@dataclass
class Room:
    """What the activations of one chunk of passes may take, in bytes; shared by the blocks of a backend."""

    usual: int
    bytes: int = 0

    def __post_init__(self) -> None:
        """Starts with the usual."""
        self.bytes = self.bytes or self.usual

    @property
    def given(self) -> bool:
        """Whether somebody has said how much, or the memory that there is has."""
        return self.bytes != self.usual

    def halve(self) -> None:
        """Takes less from now on."""
        self.bytes = max(1, self.bytes // 2)

    def pass_bytes(self, plan: Plan) -> int:
        """Gives what a further pass of one row needs."""
        once = plan.tier in (CAPTURED, "vmap")
        return self._of(plan, plan.trace.pass_bytes if once else plan.trace.row_bytes)

    def shared_bytes(self, plan: Plan) -> int:
        """Gives what a further pass needs besides, for all rows together."""
        return self._of(plan, plan.trace.shared_bytes)

    def _of(self, plan: Plan, largest: int) -> int:
        """What is needed for a largest result: some four of them are alive at a time."""
        # where the memory was not given, a measurement has said how much of it is fastest
        return int(4 * largest / (1.0 if self.given else plan.chunk))


class Ready:
    """One block of rows with the weights of the moment; made for one run, by one thread.

    Raises:
        InputError: the last dropout is asked for in closed form and has none.
    """

    def __init__(self, plans: Plans, rows: Rows, room: Room, *, exact_last: bool, rides: bool = True) -> None:
        """Takes the plans of a network, the rows, and the memory that there is for them.

        ``rides``: the output with every draw off, which is asked for later, may come along with the first passes.
        """
        self._plans, self._rows, self._room, self._exact_last = plans, rows, room, exact_last
        self._plan, self._tensors, self._weights = plans.current(rows)
        self._on_gpu: bool = self._tensors.leaves[0].is_cuda
        self._whole = self._plan  # the passes of all units and draws, of which the deterministic output is one
        if exact_last:
            if self._plan.exact is None:
                tier = f"{self._plan.tier!r} runs this one ({self._plan.reason})"
                raise InputError(
                    "exact_last needs a captured network whose output is a linear layer straight after dropout; "
                    + (tier if self._plan.program is None else "that of this one is not")
                )
            self._plan = replace(self._plan, program=self._plan.exact)
        elif self._plan.kept_from is not None and rows.count >= self._plan.kept_from:
            self._plan = replace(self._plan, program=self._plan.kept, rides=False)
        self._rides = rides and self._plan.rides
        self._begun: tuple[Values, Values] | None = None
        self._off: Outputs | Tensor | None = None
        self._short = False  # of memory for sums

    @property
    def most(self) -> int:
        """How many passes of these rows should be run at a time."""
        return max(1, self._room.bytes // self._needed)

    @property
    def _needed(self) -> int:
        """What a pass of these rows needs."""
        needed = max(1, self._room.pass_bytes(self._whole))
        if self._on_gpu and self._plan.program is not None:
            needed = max(needed, _SUMMING * self._plan.program.width)
        return needed * self._rows.count + self._room.shared_bytes(self._whole)

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> Outputs:
        """Gives the outputs of some passes; out of memory, half of the passes or of the rows at a time."""
        try:
            return as_numpy(self._forward(Span(passes, seed, start, sampler), None))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or passes * self._rows.count == 1:
                raise
        self._room.halve()
        self._plans.release()
        if passes > 1:
            half = passes // 2
            spans = [(start, half), (start + half, passes - half)]
            return np.concatenate([self.forward(n, seed=seed, start=at, sampler=sampler) for at, n in spans])
        parts = [
            Ready(self._plans, part, self._room, exact_last=self._exact_last, rides=False)
            for part in self._rows.split(-(-self._rows.count // 2))
        ]
        return np.concatenate([part.forward(1, seed=seed, start=start, sampler=sampler) for part in parts], axis=1)

    def sums_there(self, passes: int) -> bool:
        """Whether so many passes are to be summed up on a GPU."""
        program = self._plan.program
        many = program is None or passes * self._rows.count * program.width >= _MANY
        return self._on_gpu and many and not self._short

    def summed(
        self, passes: int, *, seed: int, start: int, sampler: str, summing: Summing
    ) -> NDArray[np.float64] | None:
        """Gives what is made of the same passes on a GPU; None out of memory."""
        try:
            sums = self._forward(Span(passes, seed, start, sampler), summing)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self._short = True
            self._plans.release()
            return None
        there: NDArray[Any] = sums if isinstance(sums, np.ndarray) else sums.cpu().numpy()
        return there

    def deterministic(self) -> Outputs:
        """Gives the outputs with every draw off: a pass of its own, unless it rode along with the first passes."""
        if self._off is not None:
            return as_numpy(self._off)
        program = self._whole.program if self._whole.rides else None
        if program is not None and program.holds(1, self._rows.count):
            try:
                return self._expected(program)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
        return self._plans.deterministic(self._rows)

    def _expected(self, program: Program) -> Outputs:
        """Runs one pass whose masks hold their expectations."""
        values = self._plans.expected_values(self._whole)
        with program.without_gradients(), self._plans.arithmetic(self._tensors), said_of(self._tensors):
            return as_numpy(straight(program, values, self._tensors, 1)[0])

    def _forward(self, span: Span, summing: Summing | None) -> Outputs | Tensor:
        program = self._plan.program
        if program is not None and program.holds(span.passes, self._rows.count):
            return self._captured(program, span, summing)
        if self._exact_last:
            raise InputError(f"the last dropout of this network has no closed form for {self._rows.count} rows")
        try:
            outputs = self._eager(span)
        except LargerDraw:
            self._plan = self._plans.widened(self._plan, self._tensors)
            outputs = self._eager(span)
        return outputs if summing is None else summed_up(outputs, summing)

    def _eager(self, span: Span) -> Tensor:
        """Runs the network's own code, as where a captured graph does not hold for so many rows."""
        plan, plans = replace(self._plan, program=None), self._plans
        stacks = plans.stacks(plan, span)
        with torch.no_grad(), plans.turn, plans.arithmetic(self._tensors):
            if plan.tier == CAPTURED:
                # another way of the network's than the one that its tiers were proved on, and the loop takes them all
                with suppress(InputError), said_of(self._tensors):
                    return plans.through(plan, self._tensors, stacks)
            with said_of(self._tensors):
                tier = "loop" if plan.tier == CAPTURED else None
                return plans.through(plan, self._tensors, stacks, tier)

    def _captured(self, program: Program, span: Span, summing: Summing | None) -> Outputs | Tensor:
        """Runs the program: it keeps nothing on itself, so other threads may run it meanwhile."""
        rides = self._rides and span.start == 0 and self._off is None
        values = self._plans.values(self._plan, span, ride=rides)  # kept, so made outside of torch's inference mode
        finish = Finish(span.passes, rides, summing)
        found: Sequence[Outputs | Tensor]
        with program.without_gradients(), said_of(self._tensors):
            played = self._played(program, values, finish) if self._on_gpu else None
            if played is None or not played.finite:
                self._rows.look()
            if played is None:
                with self._plans.arithmetic(self._tensors):
                    found = finish(self._run(program, values, finish.together))
            else:
                self._rows.unseen.clear()
                found = played.found
            if summing is None:  # numpy takes less time to cut
                outputs = as_numpy(found[0])
                found = outputs[: span.passes], outputs[-1]
        if rides:
            off = found[1] if isinstance(found[1], np.ndarray) else found[1].clone()  # else all passes stay with it
            self._off = off[..., : off.shape[-1] // 2] if self._exact_last else off  # the mean alone
        return found[0]

    def _run(self, program: Program, masks: Values, passes: int) -> Tensor:
        if self._begun is None:
            weights = program.weights(self._weights)
            self._begun = weights, program.rows(weights, self._tensors.leaves, self._rows.count)
        return program.passes(self._begun[0], masks, self._begun[1], passes, self._rows.count)

    def _played(self, program: Program, masks: Values, finish: Finish) -> Played | None:
        """Plays a recording of a small run on a GPU, where there is one; later chunks have less to do than it does."""
        leaves, weights, rows = self._tensors.leaves, self._weights, self._rows.count
        if weights is None or self._begun is not None:
            return None
        if finish.summing is not None and finish.summing.first is not None:  # which is another one every time
            return None
        # a larger run keeps the GPU busy for longer than it takes to start, or is one of several chunks
        if _SMALL * finish.passes * self._needed > self._room.bytes:
            return None
        return program.played(weights, masks, leaves, rows, finish, lambda: self._plans.arithmetic(self._tensors))
