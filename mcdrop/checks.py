"""Checks of a traced network: masks change it; same masks, same answer; rows alone; its expectation is eval's."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mcdrop.agreement import difference
from mcdrop.breaking import may_break_off
from mcdrop.digits import tolerance
from mcdrop.errors import UncontrolledDraw
from mcdrop.forward import draws_off, may_fail, out_of_memory
from mcdrop.generators import moved_on
from mcdrop.holders import inside
from mcdrop.intercept import EachRow
from mcdrop.layouts import FEW
from mcdrop.masks import sample_masks
from mcdrop.one_order import apart, repeats
from mcdrop.outputs import Pick
from mcdrop.quiet import first_line
from mcdrop.record import Spy, record
from mcdrop.rewound import REWOUND
from mcdrop.rows import Rows
from mcdrop.telling import halved, telling
from mcdrop.trace import Trace, one_pass, repeat_rows
from mcdrop.volatile import Left, alike

__all__ = ["Alone", "alone", "changing", "mean_preserving", "same_again", "seeded_anew", "unrepeatable"]

_SAME = 1e-6  # a GPU adds up in no order
_SO = "so a row's answer depends on its batch, all rows of which share the masks of a pass"
_BETWEEN = (
    ": rows are compared with one another, or picked, by this draw: with one mask for all rows of a pass its spread is "
    "not that of training, where each row has its own"
)
_TRIES = 6
_APART = 1000  # seeds of other masks
_FEW = 8
_LOOSE = 3  # other kernels are chosen for other numbers of rows
_FAR_LESS = 0.1  # of what masks of rows' own move


def _masks(found: Trace, rows: Rows, *, seed: int = 0) -> list[Tensor]:
    """The draws of one pass."""
    device = rows.leaves[0].device
    drawn = sample_masks(found.sites, 1, seed=seed)
    return [torch.as_tensor(drawn[site.name][0]).to(device) for site in found.sites]


def changing(live: nn.Module, rows: Rows, pick: Pick, found: Trace, *, by_one: bool) -> Callable[[int], bool]:
    """Gives what says of a site whether another mask on it alone changes the output; one pass is shared by all.

    ``by_one`` lets the first row show it, which takes a part of the time; only where it does not are all looked at.
    """
    # the others drawn too: some draws only show where another one is not at its expectation
    drawn = cache(lambda seed: _masks(found, rows, seed=seed))
    others = cache(lambda seed: _told(found, rows, seed=_APART + seed))

    @torch.no_grad()
    def output(masks: Sequence[Tensor | None], count: int = rows.count) -> Tensor:
        return one_pass(live, rows.take(slice(0, count)), pick, found, masks)

    base = cache(lambda seed, count: output(drawn(seed), count))

    def differs(index: int, seed: int, count: int, other: Tensor) -> bool:
        masks = [*drawn(seed)]
        masks[index] = other
        runs = partial(output, drawn(seed), count), partial(output, masks, count)
        return _moved(base(seed, count), runs[1](), runs)

    before = Left(live)
    tries = [(0, 1)] * by_one + [(seed, rows.count) for seed in range(_TRIES)]

    def changes(index: int) -> bool:
        few = math.prod(found.sites[index].shape) <= _FEW  # another mask of so few units may be the same
        for seed, count in tries:
            if few and differs(index, seed, count, _opposite(drawn(seed)[index], found.sites[index].kind)):
                return True
            with may_break_off(live, before):
                if differs(index, seed, count, others(seed)[index]):
                    return True
                continue
            if differs(index, seed, count, drawn(_APART + seed)[index]):  # where it does not take those
                return True
        # of many draws in a row often no unit passes all, whatever one of them does
        with may_break_off(live, before):
            kept = [i == index or site.constant for i, site in enumerate(found.sites)]
            each = ([mask if kept[i] else None for i, mask in enumerate(others(seed))] for seed in (0, 1))
            one, other = (partial(output, masks) for masks in each)
            return _moved(one(), other(), (one, other))
        return False

    return changes


def _moved(one: Tensor, other: Tensor, again: tuple[Callable[[], Tensor], Callable[[], Tensor]]) -> bool:
    return apart(one, other, again, _as_list)


def _as_list(output: Tensor) -> list[Tensor]:
    return [output]


def _told(found: Trace, rows: Rows, *, seed: int) -> list[Tensor]:
    """The draws of one pass under which a rare drop is seen as well as a common one."""
    drawn = telling(found.sites, 1, seed=seed)
    return [torch.as_tensor(drawn[site.name][0]).to(rows.leaves[0].device) for site in found.sites]


def _both_ways(found: Trace, rows: Rows) -> list[list[Tensor]]:
    """Draws of a pass that tell, and their opposites: a draw of a single unit goes each way in one of them."""
    told = _told(found, rows, seed=0)
    return [told, [_opposite(mask, site.kind) for mask, site in zip(told, found.sites, strict=True)]]


def _opposite(mask: Tensor, kind: str) -> Tensor:
    """Gives a mask that is unlike another in all units, or far from it."""
    return {"bernoulli": 1 - mask, "normal": -mask}.get(kind, torch.where(mask < 0.5, 0.999, 0.001))


def unrepeatable(live: nn.Module, rows: Rows, pick: Pick, found: Trace) -> list[str]:
    """Says so where the same masks give another output, such as where something draws out of sight."""
    if found.escaped:
        return []
    said = _other_again(live, rows, pick, found, _masks(found, rows))
    for masks in _both_ways(found, rows):  # a rare draw may lead to what is not seen otherwise
        with may_break_off(live):
            said = said or _other_again(live, rows, pick, found, masks)
    return said


def _other_again(live: nn.Module, rows: Rows, pick: Pick, found: Trace, masks: list[Tensor]) -> list[str]:
    before = inside(live)

    @torch.no_grad()
    def again(given: list[Tensor] = masks) -> Tensor:
        return one_pass(live, rows, pick, found, given)

    first = again()
    if repeats(first, again, _as_list, looks=1) or same_again(first, again(), again(_masks(found, rows, seed=1))):
        return []
    said = "a generator out of sight, such as numpy's Generator, gives other numbers at each call"
    left = [name for name, held in inside(live).items() if not alike(held, before.get(name))]
    if left:
        said += (
            f", or it goes on from what its last call left in {', '.join(left)}: mcdrop can put back what is in "
            "tensors, numbers, lists, tuples and dicts"
        )
    return [said]


def same_again(first: Tensor, again: Tensor, other: Tensor) -> bool:
    """Whether one computation gave the same twice, as far as other masks move it; also digits of 16 bits repeat."""
    first, again, other = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (first, again, other))
    return difference(again, first, passes=torch.stack([first, other])) <= _SAME


def seeded_anew(live: nn.Module, rows: Rows, pick: Pick, spy: Spy) -> list[str]:
    """Says so where a pass seeds a generator of its own, or puts a state back: numbers come again, masks would not."""
    rewound, noted = [f"{REWOUND} in {path or 'the root module'}" for path in sorted(spy.rewound)], spy.generators
    if rewound or not noted:
        return rewound
    with moved_on(noted):
        again = record(live, rows, pick, seed=0)[1].generators
    if not any(torch.equal(state, other) for (_, state), (_, other) in zip(noted, again, strict=False)):
        return []
    return ["numbers of a generator that every pass seeds anew are always the same: keep them in a buffer instead"]


def mean_preserving(live: nn.Module, plain: nn.Module, rows: Rows, pick: Pick, found: Trace) -> bool:
    """Whether the network with every draw at its expectation equals plain eval."""
    with torch.no_grad():
        expected = one_pass(live, rows, pick, found, _expectations(found, rows))
        eval_output = draws_off(plain, rows, pick)
        passes = torch.stack([expected, one_pass(live, rows, pick, found, _masks(found, rows))])
    return difference(expected.to(eval_output), eval_output, passes=passes, by_output=True) <= 1e-4


def _expectations(found: Trace, rows: Rows) -> list[Tensor | None]:
    """The expectation of every draw; of a mask the keep rate itself, at which alpha dropout is not the identity."""
    device = rows.leaves[0].device
    return [
        torch.full(site.shape, 1 - site.p, device=device) if site.kind == "bernoulli" else None for site in found.sites
    ]


class Alone(NamedTuple):
    """What is said of rows that are alone, and whether one has to stand ``beside`` itself to answer as among others."""

    said: tuple[str, ...] = ()
    beside: bool = False


@torch.no_grad()
def alone(module: nn.Module, rows: Rows, pick: Pick, found: Trace, excluded: frozenset[str]) -> Alone:
    """Looks whether a row that is alone answers as it does among the others, with the same masks, and with other ones.

    Seen on the example rows: a network may still couple others, as by a branch on a value.
    """
    single = _same_masks(module, rows, pick, found)
    few = rows if rows.count > 1 else repeat_rows(rows, FEW)
    even = replace(found, sites=tuple(halved(found.sites)))
    kinds = ([_masks(even, few, seed=seed) for seed in (0, 1)], [_told(found, few, seed=seed) for seed in (0, 1)])
    compared = (_compared(module, few, pick, found, excluded, *pair) for pair in kinds)
    return single._replace(said=(*single.said, *next(filter(None, compared), ())))


def _same_masks(module: nn.Module, rows: Rows, pick: Pick, found: Trace) -> Alone:
    if found.unclear or rows.count == 1:  # said of each draw, and not to be tried with another number of rows
        return Alone()
    said = _under(module, rows, pick, found, _masks(found, rows))
    for masks in _both_ways(found, rows):
        with may_break_off(module):
            said = said if any(said) else _under(module, rows, pick, found, masks)
    return said


def _under(module: nn.Module, rows: Rows, pick: Pick, found: Trace, masks: list[Tensor]) -> Alone:
    """What is said of rows that are alone under some masks."""
    together, other = (one_pass(module, rows, pick, found, given) for given in (masks, _masks(found, rows, seed=1)))
    passes = torch.stack([together, other])

    def off(row: int, times: int) -> float:
        """How far a row that is given so many times is from itself among the others."""
        one = one_pass(module, rows.take([row] * times), pick, found, masks)[:1]
        worst = difference(one, together[row : row + 1], passes=passes[:, row : row + 1])
        return 0.0 if worst <= _LOOSE * tolerance(one.dtype) else worst

    for row in range(rows.count):
        try:
            worst = off(row, 1)
        except Exception as error:
            if out_of_memory(error):
                raise
            with may_fail():
                if not any(off(other, 2) for other in range(rows.count)):
                    return Alone(beside=True)
            if isinstance(error, UncontrolledDraw):
                return Alone((f"row {row} of the example takes a way of its own when it is alone ({error}), {_SO}",))
            return Alone((f"the network does not take a single row ({first_line(error)}), {_SO}",))
        if worst:
            said = f"row {row} of the example alone is off by {worst:.1e} from the same row among others, {_SO}"
            return Alone((said,))
    return Alone()


def _compared(
    live: nn.Module, few: Rows, pick: Pick, found: Trace, excluded: frozenset[str], one: list[Tensor],
    other: list[Tensor],
) -> list[str]:  # fmt: skip
    """Names the draws by which rows are compared or picked: they move the output where rows have masks of their own.

    That is so in training; a pass has one for all rows. Draws of excluded modules are not named.
    """
    own = {i for i, layout in enumerate(found.layouts) if layout is not None}

    def changed(at: Collection[int]) -> list[Tensor]:
        return [other[i] if i in at else mask for i, mask in enumerate(one)]

    def shared(masks: Sequence[Tensor]) -> Tensor:
        return one_pass(live, few, pick, found, masks)

    def in_turn(*pair: Sequence[Tensor]) -> Tensor:
        """Every second row gets the second masks."""
        counts = [few.count if i in own else 1 for i in range(len(one))]
        each = [torch.stack([pair[row % 2][i] for row in range(count)]) for i, count in enumerate(counts)]
        return one_pass(live, few, pick, found, each, EachRow)

    def look_at_one_another() -> bool:
        masks, passes = (one, changed(own)), torch.stack([shared(one), shared(changed(own))])
        worst = 0.0
        for first in (0, 1):
            expected = passes[first].clone()
            expected[1::2] = passes[1 - first, 1::2]
            worst = max(worst, difference(in_turn(masks[first], masks[1 - first]), expected, passes=passes))
        return worst > _LOOSE * tolerance(passes.dtype)

    def vanishes(index: int) -> bool:
        base, others = shared(one), changed({index})
        alike = difference(shared(others), base, scale=1.0)
        apart = (difference(in_turn(*pair), base, scale=1.0) for pair in ((one, others), (others, one)))
        return alike < _FAR_LESS * max(apart)

    with may_break_off(live):
        if own and not found.unclear and look_at_one_another():
            names = {i: found.sites[i].name for i in sorted(own)}
            off = found.left_off(excluded)
            return [f"{name}{_BETWEEN}" for i, name in names.items() if name not in off and vanishes(i)]
    return []
