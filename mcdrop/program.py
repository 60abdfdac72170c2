"""The passes of one input signature as a program: run in stages, each no oftener than what it reads changes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from mcdrop.capture import Captured
from mcdrop.masks import Site
from mcdrop.quiet import ALONE
from mcdrop.replay import Finish, Played, Recordings
from mcdrop.stages import Values, make_stages

__all__ = ["Program", "Values"]

_MATMUL: Any = torch.backends.cuda.matmul


class Program:
    """The passes of one input signature, from tensors to outputs (T, N, ...); safe to use from several threads.

    Raises:
        NotCaptured: the graph asks for a size that is not made of the numbers of rows and passes.
    """

    def __init__(
        self, captured: Captured, *, dtype: torch.dtype | None = None, exact: Sequence[Site] | None = None,
        kept: bool = False, fused: bool = True, few_digits: bool = False,
    ) -> None:  # fmt: skip
        """Takes a captured graph, and the type that weights and inputs are to be given in (None: their own).

        With ``exact``, the sites of its masks, outputs are mean and variance over the last mask, (T, N, ..., 2 D);
        with ``kept`` each pass computes with the units that it keeps. Layers are ``fused`` with what follows them;
        ``few_digits`` says that a GPU multiplies in tf32.
        """
        self._captured = captured
        self.dtype = dtype
        self._held: dict[tuple[int, int], bool] = {}
        made = make_stages(captured, exact, kept=kept, fused=fused, few_digits=few_digits)
        self._stages, self._per_pass, self._fixed = made.run, made.per_pass, made.fixed
        self._only_looks = made.only_looks and dtype is None
        self._looked: tuple[list[Tensor], Values] | None = None
        self.plain = self  # the same before it was compiled
        self.fewest_rows = 1  # that it was proved for
        self._recordings, self._recordable = Recordings(), captured.recordable
        self.width = captured.width

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

    def without_gradients(self) -> AbstractContextManager[Any]:
        """In which it is run fastest; a compiled one knows tensors by whether they could have gradients."""
        return torch.inference_mode() if self.plain is self else torch.no_grad()

    def today(self) -> list[Tensor] | None:
        """Gives the weights of today; None where they are not there, shaped, typed and shared as at capture."""
        return self._captured.standing.now()

    def weights(self, tensors: list[Tensor] | None = None) -> Values:
        """Gives what follows from weights that ``today`` gave, or from those of now."""
        tensors = tensors or self.today() or []
        if not self._only_looks:
            typed = tensors if self.dtype is None else _typed(tensors, self.dtype)
            return *self._run("weights", *typed), *self._run("folded", *typed)
        looked = self._looked
        if looked is None or looked[0] is not tensors:
            looked = tensors, self._run("weights", *tensors)
            if _look_at(looked[1], tensors):  # as a weight laid out otherwise does not
                self._looked = looked
        return *looked[1], *self._run("folded", *tensors)

    def masks(self, stacks: Sequence[Tensor]) -> Values:
        """Gives what follows from the masks, one stack (T, ...) a draw."""
        return self._run("masks", *stacks, len(stacks[0]))

    def more(self, masks: Values, others: Values) -> Values:
        """Gives what follows from masks and further ones together."""
        each = zip(masks, others, self._per_pass, strict=True)
        return tuple(torch.cat([one, other]) if per_pass else one for one, other, per_pass in each)

    def rows(self, weights: Values, leaves: Sequence[Tensor], count: int) -> Values:
        """Gives what comes before the first draw, for a block of rows."""
        if self.dtype is not None:
            leaves = _typed(leaves, self.dtype)
        if self.plain is not self:  # compiled: it tells a part of another tensor from a whole one, and compiles anew
            leaves = [leaf.clone() for leaf in leaves]
        return self._run("rows", *weights, *leaves, count)

    def passes(self, weights: Values, masks: Values, rows: Values, passes: int, count: int) -> Tensor:
        """Gives the outputs (T, N, ...)."""
        output: Tensor = self._run("passes", *weights, *masks, *rows, passes, count)[0]
        return output

    def played(
        self, weights: list[Tensor], masks: Values, leaves: Sequence[Tensor], count: int, finish: Finish,
        arithmetic: Callable[[], AbstractContextManager[None]],
    ) -> Played | None:  # fmt: skip
        """Gives what is made of the outputs, by a CUDA graph of the whole run; None where there is none.

        It computes as within ``arithmetic`` at the time of its recording.
        """

        def run(masks: Values, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
            with arithmetic():
                given = self.weights(weights)
                return finish(self.passes(given, masks, self.rows(given, leaves, count), finish.together, count))

        if not self._recordable or not all(isinstance(mask, Tensor) for mask in masks):
            return None
        return self._recordings.play((count, finish.key), run, weights, masks, leaves)

    def compiled(self) -> "Program":
        """Gives the same with the costly stages compiled by torch.

        Raises:
            NotCaptured: torch cannot compile here.
        """
        other = Program(self._captured, dtype=self.dtype, fused=False)  # which the compiler does by itself
        other.plain, other.fewest_rows = self, self.fewest_rows
        compiled = {
            name: _alone(torch.compile(other._stages[name], fullgraph=True, dynamic=True), other._fixed[name])
            for name in ("rows", "passes")
        }
        other._stages |= compiled
        return other

    def _run(self, stage: str, *values: Any) -> Values:
        found: Values = self._stages[stage](*values)
        return found


def _look_at(values: Values, tensors: Sequence[Tensor]) -> bool:
    """Whether all values lie in the memory of tensors, so that numbers that are written there show in them."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return all(value.untyped_storage().data_ptr() in memory for value in values)


def _typed(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gives real tensors another type; all at once, since on a GPU each would take a kernel of its own."""
    typed = [torch.empty_like(t, dtype=dtype) if t.is_floating_point() else t for t in tensors]
    real = [place for place, t in enumerate(tensors) if t.is_floating_point()]
    if real:
        torch._foreach_copy_([typed[place] for place in real], [tensors[place] for place in real])
    return typed


def _alone(run: Callable[..., Values], fixed: Sequence[Sequence[int]]) -> Callable[..., Values]:
    """A compiled function that no other thread traces beside: it refuses to run then, and may have to compile anew.

    When it may compile it is told which axes of its values are the same for all rows and passes, by notes on tensors
    other than the user's own.
    """
    told: set[object] = set()

    def guarded(*values: Any) -> Values:
        given = [value.detach() if isinstance(value, Tensor) else value for value in values]
        # what torch compiles anew for: sizes of 1, and the digits of a GPU
        ones = *(value == 1 for value in values if isinstance(value, int)), _MATMUL.fp32_precision
        # sizes that happen to be equal, such as rows and units, are not the same size: else other rows compile anew
        with ALONE, _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            if ones not in told:
                _note(given, fixed)
            found = run(*given)
            told.add(ones)
            return found

    return guarded


def _note(values: Sequence[Any], fixed: Sequence[Sequence[int]]) -> None:
    for value, axes in zip(values, fixed, strict=True):
        for axis in axes:
            torch._dynamo.mark_static(value, axis)
