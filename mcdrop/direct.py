"""Passes one by one with the masks of all made ready at once.

Where all draws are those of torch's dropout layers, these take their masks themselves and nobody looks at the other
operations: a function mode looks at every call of a pass, which takes a small network as long as its arithmetic.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mcdrop.errors import UncontrolledDraw
from mcdrop.forward import forward
from mcdrop.intercept import Given, Interception, result
from mcdrop.layouts import Layout
from mcdrop.outputs import Pick
from mcdrop.registry import TAUGHT_FUNCTIONS
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.shadow import PLAYING, takes_masks
from mcdrop.standing import attributes
from mcdrop.trace import Trace

__all__ = ["pass_by_pass", "passes_of"]


def pass_by_pass(module: nn.Module, rows: Rows, pick: Pick, found: Trace, stacks: Sequence[Tensor | None]) -> Tensor:
    """Gives passes with the masks of stacks (T, *unit), one for each draw, as (T, N, ...).

    Raises:
        UncontrolledDraw: the network took another way than when it was traced, or drew where nobody looked.
    """
    masks, outputs = _Masks(stacks, found, rows.count), []
    mode = _Ready(masks, RULES)
    with mode if _looks(module, found) else _alone(mode, rows.leaves[0].device):
        for number in range(passes_of(stacks)):
            masks.begin(number)
            outputs.append(forward(module, rows, pick))
            masks.finish()
    return torch.stack(outputs)


def passes_of(stacks: Sequence[Tensor | None]) -> int:
    """Gives the number of passes that stacks of masks are for."""
    return next(len(stack) for stack in stacks if stack is not None)


def _looks(module: nn.Module, found: Trace) -> bool:
    """Whether something may be drawn that no dropout layer and no generator of torch shows."""
    elsewhere = any(not takes_masks(module.get_submodule(site.path)) for site in found.sites)
    own = any(isinstance(vars(owner)[key], torch.Generator) for _, owner, key in attributes(module))
    return bool(elsewhere or own or found.forced or TAUGHT_FUNCTIONS)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that are drawn from where nobody says which."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


@contextmanager
def _alone(mode: "_Ready", device: torch.device) -> Iterator[None]:
    """Lets this thread's dropout layers take their masks from a mode that looks at nothing else."""
    before, outer, PLAYING.mode = _generators(device), getattr(PLAYING, "mode", None), mode
    try:
        yield
    finally:
        PLAYING.mode = outer
    if not all(map(torch.equal, before, _generators(device))):
        raise UncontrolledDraw("the network, or another thread meanwhile, drew from torch's generator")


class _Masks(Given):
    """Ready masks of many passes, of which those of one are handed out at a time."""

    def __init__(self, stacks: Sequence[Tensor | None], found: Trace, rows: int) -> None:
        super().__init__(stacks, found.layouts, found.forced, found.rates, found.sites, rows)
        self._number = 0
        self._ready: dict[object, tuple[Tensor, ...] | None] = {}

    def begin(self, number: int) -> None:
        """Begins with a pass."""
        self._number, self._next, self._off = number, 0, 0

    def _take(self, kind: str, shape: tuple[int, ...], p: float) -> tuple[int, Tensor | None, Layout | None]:
        index, stack, layout = super()._take(kind, shape, p)
        return index, None if stack is None else stack[self._number], layout

    def scaled(self, x: Tensor, p: float, leading: int) -> Tensor | None:
        """Gives the next mask as it is multiplied with x, divided by 1 - p; None for the expectation."""
        asked = self._next, x.shape, x.dtype, p, leading
        if asked in self._ready:
            self._next += 1
        else:
            self._ready[asked] = self._made(x, p, leading)
        ready = self._ready[asked]
        return None if ready is None else ready[self._number]

    def _made(self, x: Tensor, p: float, leading: int) -> tuple[Tensor, ...] | None:
        shape = tuple(x.shape[:leading])
        index, stack, layout = super()._take("bernoulli", shape, p)
        if stack is None:
            return None
        if index in self._rates:
            stack = stack >= p
        if layout is not None:
            stack = torch.stack([layout.spread(mask, shape) for mask in stack])
        scale = 1 / (1 - p) if p < 1 else 0.0
        return (stack.to(x.dtype).reshape(*stack.shape, *(1,) * (x.dim() - leading)) * scale).unbind()


class _Ready(Interception):
    """Drops with masks that are ready."""

    source: _Masks

    def drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Inverted dropout, as everywhere."""
        kept = self.source.scaled(x, p, x.dim() if leading is None else leading)
        return result(x) if kept is None else x * kept
