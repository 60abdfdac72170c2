"""The passes of one input signature as a program: run in stages, each no oftener than what it reads changes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from mcdrop.capture import Captured
from mcdrop.masks import Site
from mcdrop.quiet import ALONE
from mcdrop.stages import Values, make_stages

__all__ = ["Program", "Values"]


class Program:
    """The passes of one input signature, from tensors to outputs (T, N, ...); safe to use from several threads.

    Raises:
        NotCaptured: the graph asks for a size that is not made of the numbers of rows and passes.
    """

    def __init__(
        self, captured: Captured, *, dtype: torch.dtype | None = None, exact: Sequence[Site] | None = None,
        kept: bool = False, fused: bool = True,
    ) -> None:  # fmt: skip
        """Takes a captured graph, and the type that weights and inputs are to be given in (None: their own).

        With ``exact``, the sites of its masks, outputs are mean and variance over the last mask, (T, N, ..., 2 D);
        with ``kept`` each pass computes with the units that it keeps. Layers are ``fused`` with what follows them.
        """
        self._captured = captured
        self.dtype = dtype
        self._facts = _facts(captured)
        self._held: dict[tuple[int, int], bool] = {}
        self._stages = make_stages(captured, exact, kept, fused)
        self.plain = self  # the same before it was compiled
        self.fewest_rows = 1  # that it was proved for

    def holds(self, passes: int, rows: int) -> bool:
        """Whether it stands for so many passes of so many rows of the network with weights like today's."""
        if rows < self.fewest_rows:
            return False
        if not self._captured.guards:
            return True
        key = (passes, rows)
        if key not in self._held:
            self._held[key] = self._captured.holds(passes, rows)
        return self._held[key]

    def fits(self) -> bool:
        """Whether today's weights are there, shaped, typed and shared as those that it was captured with."""
        return _facts(self._captured) == self._facts

    def weights(self) -> Values:
        """Gives what follows from the weights of today."""
        tensors = [tensor for tensor in self._captured.now() if tensor is not None]
        if self.dtype is not None:
            tensors = [t.to(self.dtype) if t.is_floating_point() else t for t in tensors]
        return *self._run("weights", *tensors), *self._run("folded", *tensors)

    def masks(self, stacks: Sequence[Tensor]) -> Values:
        """Gives what follows from the masks, one stack (T, ...) a draw."""
        return self._run("masks", *stacks, len(stacks[0]))

    def rows(self, weights: Values, leaves: Sequence[Tensor], count: int) -> Values:
        """Gives what comes before the first draw, for a block of rows."""
        if self.dtype is not None:
            leaves = [leaf.to(self.dtype) if leaf.is_floating_point() else leaf for leaf in leaves]
        if (
            self.plain is not self
        ):  # a compiled stage tells a part of another tensor from a whole one, and compiles anew
            leaves = [leaf.clone() for leaf in leaves]
        return self._run("rows", *weights, *leaves, count)

    def passes(self, weights: Values, masks: Values, rows: Values, passes: int, count: int) -> Tensor:
        """Gives the outputs (T, N, ...)."""
        output: Tensor = self._run("passes", *weights, *masks, *rows, passes, count)[0]
        return output

    def compiled(self) -> "Program":
        """Gives the same with the costly stages compiled by torch, on a GPU as CUDA graphs.

        Raises:
            NotCaptured: torch cannot compile here.
        """
        other = Program(self._captured, dtype=self.dtype, fused=False)  # which the compiler does by itself
        other.plain, other.fewest_rows = self, self.fewest_rows
        mode = (
            "reduce-overhead"
            if any(fact[2].type == "cuda" for fact in self._facts if isinstance(fact, tuple))
            else None
        )
        compiled = {
            name: _alone(torch.compile(other._stages[name], fullgraph=True, dynamic=True, mode=mode))
            for name in ("rows", "passes")
        }
        other._stages |= compiled
        return other

    def _run(self, stage: str, *values: Any) -> Values:
        found: Values = self._stages[stage](*values)
        return found


def _alone(run: Callable[..., Values]) -> Callable[..., Values]:
    """A compiled function that no other thread traces beside: it refuses to run then, and may have to compile anew."""

    def guarded(*values: Any) -> Values:
        # sizes that happen to be equal, such as rows and units, are not the same size: else other rows compile anew
        with ALONE, _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return run(*values)

    return guarded


def _facts(captured: Captured) -> list[Any]:
    """What a graph takes for granted of the weights: which are there, their shapes and types, and which are one."""
    tensors = captured.now()
    facts: list[Any] = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    seen = [id(tensor) for tensor in tensors if tensor is not None]
    return facts if len(set(seen)) == len(seen) else [*facts, [seen.index(one) for one in seen]]
