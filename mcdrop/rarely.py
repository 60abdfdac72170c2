"""What passes do where the numbers of all draws are low, or high, as hardly any pass has them."""

from torch import nn

from mcdrop.breaking import may_break_off
from mcdrop.outputs import Pick
from mcdrop.record import ALL_HIGH, ALL_LOW, Draw, record
from mcdrop.rows import Rows
from mcdrop.volatile import Left

__all__ = ["rarely_escaped"]


class _Endless(BaseException):
    """A pass goes on drawing; no network is to catch that."""


class _Bounded(list[Draw]):
    """Draws of a pass, so many at most: it may draw until a number is low, which none is."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def append(self, draw: Draw) -> None:
        if len(self) >= self._most:
            raise _Endless
        super().append(draw)


def rarely_escaped(module: nn.Module, rows: Rows, pick: Pick, *, most: int) -> list[tuple[str, str]]:
    """Gives what draws out of sight in such passes, each of at most so many draws, as (module, operation)."""
    found: list[tuple[str, str]] = []
    before = Left(module)
    for seed in (ALL_LOW, ALL_HIGH):
        try:
            with may_break_off(module, before):
                found += record(module, rows, pick, seed=seed, draws=_Bounded(most))[1].escaped
        except _Endless:
            before.put_back()
    return found
