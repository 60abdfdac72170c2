"""Which axis of each draw follows the rows, and where none does since rows have as many entries as they hold."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from mcdrop.forward import may_fail
from mcdrop.layouts import FEW, Layout, Told, told_layout
from mcdrop.record import Draw, Recorder, Spy
from mcdrop.rows import Rows

__all__ = ["told_layouts"]

_EACH = 32  # rows up to which each is looked at by itself
_HALVES, _MOST = 24, 1024  # looks at so many rows at once

_Record = Callable[..., tuple[Recorder, Spy]]


def told_layouts(
    few: tuple[Recorder, Spy], more: Sequence[Draw], given: Rows, rows: Rows, record: _Record
) -> list[Told]:
    """Gives the layouts of draws from passes on ``given`` rows and on ``MORE`` of them; none told where these differ.

    Entries are counted on all ``rows``.
    """
    source, spy = few
    draws = source.draws
    shapes = [draw.shape for draw in more] if len(more) == len(draws) else [None] * len(draws)
    told = [told_layout(draw.shape, shape, given.count) for draw, shape in zip(draws, shapes, strict=True)]
    if any(one.counted for one in spy.results):
        told = _steady(told, rows, record)
    if spy.by_values:
        told = _fixed(told, draws, [given.map(torch.zeros_like), given.map(torch.ones_like)], record)
    return told


def _steady(told: Sequence[Told], rows: Rows, record: _Record) -> list[Told]:
    """Tells no layout of draws that have more entries for some rows than for others, such as those under a mask."""
    found = [*told]
    for some in _groups(rows.count):
        with may_fail():
            alike = record(rows=rows.take(some))[0].draws
            for i, (layout, _) in enumerate(told):
                fits = layout is None or (i < len(alike) and _entries(alike[i], layout) == layout.multiple * len(some))
                if not fits:
                    found[i] = None, False
    return found


def _groups(rows: int) -> Iterator[list[int]]:
    """Gives groups of rows, one of which has another number of entries where any row has.

    A look at each of many rows takes long. With or without the row in question a random half has another number: every
    second half shows it, and all of them miss it with a chance of 2^-24.
    """
    if rows <= _EACH:
        yield from ([row] * FEW for row in range(rows))
        return
    rng = np.random.default_rng(0)
    for part in np.array_split(np.arange(rows), math.ceil(rows / _MOST)):
        for half in rng.random((_HALVES, len(part))) < 0.5:
            yield part[half].tolist()


def _fixed(told: Sequence[Told], draws: Sequence[Draw], others: Iterable[Rows], record: _Record) -> list[Told]:
    """Tells no layout of several entries a row where others, rows of one value, have another number of them.

    Then further rows may have as many together but not each, even where those of the example all have as many.
    """
    found, same = [*told], [(draw.kind, draw.path) for draw in draws]
    for rows in others:
        with may_fail():  # whatever a network does with such rows
            theirs = record(rows=rows)[0].draws
            for i, (draw, other) in enumerate(zip(draws, theirs, strict=True)):
                layout = told[i][0] if same == [(one.kind, one.path) for one in theirs] else None
                if layout is not None and layout.multiple > 1 and _entries(draw, layout) != _entries(other, layout):
                    found[i] = None, False
    return found


def _entries(draw: Draw, layout: Layout) -> int | None:
    return draw.shape[layout.axis] if len(draw.shape) > layout.axis else None
