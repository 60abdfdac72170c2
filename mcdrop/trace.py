"""What every pass of an input signature does: its draws in order, and the axis of each that follows the rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from mcdrop.agreement import told_orders, uneven
from mcdrop.breaking import may_break_off
from mcdrop.digits import tolerance
from mcdrop.entries import told_layouts
from mcdrop.errors import UncontrolledDraw
from mcdrop.forward import forward, out_of_memory
from mcdrop.intercept import Given, Interception, Rules
from mcdrop.layouts import FEW, MORE, Layout, Told, own_shape
from mcdrop.masks import Site, sample_masks
from mcdrop.mixing import united
from mcdrop.outputs import Pick
from mcdrop.quiet import first_line
from mcdrop.rarely import rarely_escaped
from mcdrop.record import Draw, Recorder, Spy, nowhere, record
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.telling import telling
from mcdrop.varying import leaving_off, random_rates

__all__ = ["Trace", "one_pass", "repeat_rows", "trace", "widened"]

_SEEDS = (1, 2, 3)
_OFTEN, _MANY = 10, 100  # times as many draws as usual, and some more, at which a rare way is taken for endless
_SOME = 8  # rows whose draws a trace is to hold, as many as an example mostly has
_UNTOLD = (
    "no axis of the draw of {} follows these rows, unlike those of the example, so a row's answer would depend on its "
    "batch; to sample these, wrap the network with such rows in its example"
)
_LOOSE = 3  # other kernels are chosen for other numbers of rows
_Pass = tuple[Recorder, Spy]
_SIZES = ("row_bytes", "pass_bytes", "shared_bytes")


@dataclass(frozen=True)
class Trace:
    """What one forward pass of an input signature does.

    ``rates`` holds the numbers of the dropouts whose rate is random itself. ``unclear`` names the draws whose axis of
    the rows could not be told: their masks belong to one number of rows. ``off`` lists the module of each dropout call
    that is switched off (None where its rate is 0 besides), ``forced`` the numbers of those that drop all the same.
    ``escaped`` lists (module, operation) of draws that no rule controls, ``written`` the parameters and buffers that
    the pass writes to, ``swapped`` the modules that have others put in their place for a while. ``united`` says why
    passes cannot share a batch, and is empty where they can. ``row_bytes`` is the largest result of one operation, in
    bytes a row, ``pass_bytes`` the largest after the first draw, and ``shared_bytes`` the largest there that all rows
    share, such as weights under a mask.
    """

    sites: tuple[Site, ...]
    layouts: tuple[Layout | None, ...]
    rates: frozenset[int]
    unclear: tuple[str, ...]
    off: tuple[str | None, ...]
    forced: frozenset[int]
    escaped: tuple[tuple[str, str], ...]
    written: tuple[str, ...]
    swapped: frozenset[str]
    united: str
    row_bytes: int
    pass_bytes: int
    shared_bytes: int

    def left_off(self, excluded: frozenset[str]) -> frozenset[str]:
        """Names the draws that passes leave out: those of excluded modules, and dropout at a rate of 0.

        So all before the first draw that drops something is run once for all passes.
        """
        return frozenset(
            site.name for site in self.sites if site.path in excluded or (site.kind == "bernoulli" and not site.p)
        )


def one_pass(
    module: nn.Module,
    rows: Rows,
    pick: Pick,
    found: Trace,
    masks: Sequence[Tensor | None],
    source: type[Given] = Given,
    rules: Rules = RULES,
) -> Tensor:
    """Runs one pass with given masks, one for each draw, and gives the picked output, (N, ...)."""
    given = source(masks, found.layouts, found.forced, found.rates, found.sites, rows.leaves[0].shape[0])
    with Interception(given, rules):
        output = forward(module, rows, pick)
    given.finish()
    return output


def widened(
    found: Trace, module: nn.Module, rows: Rows, pick: Pick, force: Callable[[str], bool] = nowhere
) -> Trace:  # fmt: skip
    """Gives a trace whose draws are as large as these rows ask for, where they differ in size alone.

    Raises:
        UncontrolledDraw: they differ otherwise, or for the number of rows, not for what these hold.
    """
    once = record(module, rows, pick, seed=0, force=force)
    own = _shapes(found, once[0].draws, rows.count)
    sites = tuple(replace(a, shape=tuple(map(max, a.shape, b))) for a, b in zip(found.sites, own, strict=True))
    told = [i for i, site in enumerate(found.sites) if site.name not in found.unclear]
    if all(sites[i] == found.sites[i] for i in told):
        return replace(found, sites=sites)
    twice = record(module, repeat_rows(rows, 2 * rows.count), pick, seed=0, force=force)
    more = _shapes(found, twice[0].draws, 2 * rows.count)
    for i in told:
        if own[i] != more[i]:
            raise UncontrolledDraw(
                f"the network draws numbers of the shape {own[i]} for {rows.count} rows and of {more[i]} for twice as "
                f"many, where it drew {found.sites[i].shape} of its example: which are whose cannot be told; give it "
                "fewer rows at a time"
            )
    sizes = _memory(once[1], twice, rows.count, rows.count)
    return replace(found, sites=sites, **{name: max(getattr(found, name), size) for name, size in sizes.items()})


def _shapes(found: Trace, draws: Sequence[Draw], rows: int) -> list[tuple[int, ...]]:
    """Gives what each of the same draws has of its own for other rows."""
    shapes = []
    if len(draws) == len(found.sites):
        for draw, layout in zip(draws, found.layouts, strict=True):
            if layout is not None and len(draw.shape) > layout.axis:
                layout.check(draw.shape, rows)
            shapes.append(own_shape(draw.shape, layout))
        pairs = zip(found.sites, _sites(draws, shapes, found.rates), strict=True)
        if all(len(a.shape) == len(b.shape) and replace(a, shape=b.shape) == b for a, b in pairs):
            return shapes
    raise UncontrolledDraw("the network takes another way through these rows than through its example")


def repeat_rows(rows: Rows, count: int) -> Rows:
    """Gives ``count`` rows, the given ones over and over."""
    return rows.take(torch.arange(count, device=rows.leaves[0].device) % rows.count)


def trace(
    module: nn.Module, rows: Rows, pick: Pick, force: Callable[[str], bool] = nowhere, wrapped: Trace | None = None
) -> Trace:
    """Finds the draws of one input signature and the axis of each that follows the rows.

    The module runs on some rows, and on two more of the same, so that the longest of them is in both: the axis whose
    size differs is the rows' axis, and what is left of it when it is divided by the rows (such as attention heads)
    belongs to one row. A draw that does not differ (a weight's) is shared by all rows.

    Raises:
        UncontrolledDraw: the number of draws follows the rows, or no axis of one does, unlike when the network was
            ``wrapped``.
    """
    given = repeat_rows(rows.take(slice(0, FEW)), FEW)
    try:
        source, spy = record(module, given, pick, seed=0, force=force)
    except Exception as error:  # of a network that is built for one batch size
        if out_of_memory(error):
            raise
        given = rows
        source, spy = record(module, given, pick, seed=0, force=force)
    few, larger = source.draws, None
    on = partial(record, module, pick=pick, seed=0, force=force)
    rates = random_rates(module, (source, spy), [on(rows=given, seed=seed) for seed in _SEEDS])
    with may_break_off(module):
        larger = on(rows=repeat_rows(given, given.count + MORE))
    told = told_layouts((source, spy), larger[0].draws if larger else [], given, rows, on)
    found = Trace(
        sites=_sites(few, [own_shape(draw.shape, one) for draw, (one, _) in zip(few, told, strict=True)], rates),
        layouts=tuple(layout for layout, _ in told),
        rates=rates,
        unclear=(),
        off=tuple(source.off),
        forced=frozenset(source.forced),
        escaped=tuple(spy.escaped or rarely_escaped(module, given, pick, most=_OFTEN * len(few) + _MANY)),
        written=tuple(sorted(spy.written)),
        swapped=frozenset(spy.swapped),
        united=_united(spy, larger, partial(on, rows=repeat_rows(given, 2 * given.count))),
        **_memory(spy, larger, given.count, MORE),
    )
    with may_break_off(module):  # further rows may be longer
        found = widened(found, module, rows.take(slice(0, _SOME)), pick, force)
    ordered = _ordered(module, given, pick, found) if all(clear for _, clear in told) else None
    unclear = _unclear(ordered or found, () if ordered else told, wrapped)
    if not unclear:
        return ordered or found
    found = _of_all_rows(module, ordered or found, unclear, on(rows=rows)[0].draws)
    if wrapped is not None and not wrapped.unclear:
        raise UncontrolledDraw(_UNTOLD.format(", ".join(dict.fromkeys(repr(few[i].path) for i in sorted(unclear)))))
    return found


def _unclear(found: Trace, told: Sequence[Told], wrapped: Trace | None) -> set[int]:
    """The draws that have masks of their own for all entries.

    Of modules with such a draw when the network was wrapped, these are all that follow the rows: else answers would go
    by what was asked before.
    """
    unclear = {i for i, (layout, clear) in enumerate(told) if not clear or (layout and layout.multiple > 1)}
    doubted = {site.path for site in wrapped.sites if site.name in wrapped.unclear} if wrapped else set()
    return unclear | {i for i, site in enumerate(found.sites) if found.layouts[i] and site.path in doubted}


def _of_all_rows(module: nn.Module, found: Trace, unclear: set[int], draws: Sequence[Draw]) -> Trace:
    """Gives the trace of so many rows alone: some of their draws have masks of their own for all entries.

    Raises:
        UncontrolledDraw: other numbers of rows have other draws.
    """
    if len(draws) != len(found.sites):
        few, more = sorted(([(one.kind, one.path) for one in each] for each in (found.sites, draws)), key=len)
        path = next(two for one, two in zip_longest(few, more) if one != two)[1]
        raise UncontrolledDraw(
            "how many random numbers a pass draws depends on the number of rows, as where each row draws by itself: "
            f"draw for all rows at once{leaving_off(module, path)}"
        )
    return replace(
        found,
        sites=tuple(replace(s, shape=draws[i].shape) if i in unclear else s for i, s in enumerate(found.sites)),
        layouts=tuple(None if i in unclear else layout for i, layout in enumerate(found.layouts)),
        unclear=tuple(found.sites[i].name for i in sorted(unclear)),
    )


def _sites(draws: Sequence[Draw], shapes: Sequence[tuple[int, ...]], rates: frozenset[int]) -> tuple[Site, ...]:
    kinds = ["uniform" if i in rates else draw.kind for i, draw in enumerate(draws)]
    return tuple(Site(f"site{i}", shapes[i], draw.p, kinds[i], draw.path) for i, draw in enumerate(draws))


def _ordered(module: nn.Module, rows: Rows, pick: Pick, found: Trace) -> Trace | None:
    """Tells how the entries of a row stand, where a draw has several: by a row that stands there many times.

    It answers the same each time, whether or not rows look at one another. Usual masks are real numbers here, no two
    alike; a network may still read them as true and false, so there are some that tell beside them. None where no order
    fits.
    """
    several = {i: one.multiple for i, one in enumerate(found.layouts) if one is not None and one.multiple > 1}
    if not several:
        return found
    numbers, usual = np.random.default_rng(0), sample_masks(found.sites, 2, seed=0)
    real = (usual[site.name] * numbers.uniform(0.5, 1.5, (2, *site.shape)) for site in found.sites)
    told = telling(found.sites, 2, seed=0)
    each = [np.concatenate([masks, told[site.name]]) for site, masks in zip(found.sites, real, strict=True)]
    stacks = [torch.as_tensor(masks, dtype=torch.float32, device=rows.leaves[0].device) for masks in each]

    def placed(outer: Mapping[int, int]) -> Trace:
        layouts = [one and replace(one, outer=outer.get(i, 1)) for i, one in enumerate(found.layouts)]
        return replace(found, layouts=tuple(layouts))

    @torch.no_grad()
    def differs(outer: Mapping[int, int], on: frozenset[int], counts: Sequence[int]) -> bool | None:
        trace, given = placed(outer), [[s[t] if i in on else None for i, s in enumerate(stacks)] for t in range(4)]
        with may_break_off(module):
            for row in range(2):
                same = [rows.take([row] * count) for count in counts]
                passes = [torch.cat([one_pass(module, one, pick, trace, masks) for one in same]) for masks in given]
                # each by its own scale: noise such as 1 / u goes so far at the ends of its numbers that it hides others
                worst = max(uneven(torch.stack(kind)) for kind in (passes[:2], passes[2:]))
                if not worst <= _LOOSE * tolerance(passes[0].dtype):
                    return True
            return False
        return None

    orders = told_orders(several, differs)
    return None if orders is None else placed(orders)


def _united(few: Spy, more: _Pass | None, again: Callable[[], _Pass]) -> str:
    """Says why passes cannot share a batch; ``again`` runs the few rows twice over."""
    try:
        return united(few.results, None if more is None else more[1].results, lambda: again()[1].results)
    except Exception as error:
        return f"it does not take more rows: {first_line(error)}"


def _memory(spy: Spy, larger: _Pass | None, rows: int, further: int) -> dict[str, int]:
    """The largest results by row, by row after the first draw, and of all rows together there.

    What does not grow from some rows to more is shared; where there are none to tell, all belongs to the rows.
    """
    found = dict.fromkeys(_SIZES, 1)
    more = larger[1].results if larger is not None and len(larger[1].results) == len(spy.results) else None
    for i, one in enumerate(spy.results):
        own = one.size / rows if more is None else (more[i].size - one.size) / further
        later = bool(one.drawn)
        each = {"row_bytes": own, "pass_bytes": own * later, "shared_bytes": (one.size - own * rows) * later}
        found = {name: max(most, math.ceil(each[name])) for name, most in found.items()}
    return found
