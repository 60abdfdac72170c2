"""What every pass of an ONNX graph does with rows of one shape: its sites, and what follows the rows and how.

The graph runs with its draws off on three and on five rows, and every value in it is looked at: the axis whose size
differs is the rows' axis, and what is left of it when it is divided by the rows (such as attention heads) belongs to
one row. Small whole numbers that differ, such as shapes, are linear in the number of rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.agreement import identical
from mcdrop.errors import InputError, ModelRefused, UncontrolledDraw
from mcdrop.masks import Site
from mcdrop.onnx_bodies import ABSENT, NO_AXIS
from mcdrop.onnx_graph import depends_on, pruned
from mcdrop.onnx_mixing import united
from mcdrop.onnx_moving import moving
from mcdrop.onnx_slots import Slot
from mcdrop.rows import Rows

__all__ = ["Axis", "Observer", "Trace"]

_FEW, _MORE = 3, 5
_PLACES = ("int32", "int64")  # types in which operators are told where to read

Array = NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Axis:
    """How a value follows the rows: along an axis, ``multiple`` entries for each row; or (axis None) as numbers do.

    ``base`` is then what the numbers are for no rows at all. ``rank`` is the number of axes of the value. The entries
    of a row stand side by side, but for ``outer`` ones: the first of all rows comes before the second.
    """

    axis: int | None
    multiple: int = 1
    base: Any = None
    rank: int = 0
    outer: int = 1


@dataclass(frozen=True)
class Trace:
    """What a pass does: its sites, which of them a slot uses, and the layout of each slot's draw.

    A slot in a loop has one site a step. ``units`` are the shapes of what one row draws. ``border`` says how the values
    that enter the random part follow the rows, None for those that do not; ``unfoldable`` says why rows cannot be
    repeated, empty where they can. ``absent`` names the slots that stand in a branch which does not run.
    """

    sites: tuple[Site, ...]
    of_slot: dict[str, tuple[str, ...]]
    layouts: dict[str, Axis | None]
    units: dict[str, tuple[int, ...]]
    border: dict[str, Axis | None]
    unfoldable: str
    row_bytes: int
    dtype: str
    absent: frozenset[str]

    @property
    def several(self) -> dict[str, int]:
        """Gives the slots whose draw has several entries for each row, and how many."""
        return {mask: axis.multiple for mask, axis in self.layouts.items() if axis is not None and axis.multiple > 1}

    @property
    def shared_bytes(self) -> int:
        """The largest draw that all rows share, in bytes."""
        shared = (unit for mask, unit in self.units.items() if self.layouts[mask] is None and mask not in self.absent)
        return max((4 * math.prod(unit) for unit in shared), default=0)

    def placed(self, outer: Mapping[str, int]) -> "Trace":
        """Gives the trace in which so many entries of a row stand before the rows in these slots."""
        layouts = {mask: axis and replace(axis, outer=outer.get(mask, 1)) for mask, axis in self.layouts.items()}
        before = any(count > 1 for count in outer.values())
        unfoldable = "a draw has the first entries of all rows before their second ones" * before
        return replace(self, layouts=layouts, unfoldable=self.unfoldable or unfoldable)


class Observer:
    """A graph with its draws off that gives every value."""

    def __init__(
        self, model: Any, slots: Sequence[Slot], session: Callable[[Any], Any],
        run: Callable[[Any, list[str], Feeds], list[Any]], exported: int = 1,
    ) -> None:  # fmt: skip
        """Takes a graph of ``masks_as_inputs``, its slots, what makes a session, what runs it, and its exporter's rows.

        Raises:
            UncontrolledDraw: how many numbers a draw takes follows from values.
        """
        self._run, self._exported = run, exported
        self._model, graph = model, model.graph
        follows = moving(graph)
        for slot in slots:
            if slot.like in follows.counted:
                raise UncontrolledDraw(
                    f"how many numbers {slot.path} draws follows from the values of the rows "
                    f"({follows.counted[slot.like]}), so which of them belong to which row is not known; drop before "
                    "entries are picked by their values, or where they are back in rows of one shape"
                )
        self._slots, self._varying = slots, follows.loops
        self._initial = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        inputs = [info.name for info in graph.input if info.name not in self._initial]
        dependent = depends_on(graph, inputs)
        made = [name for node in graph.node for name in node.output if name in dependent]
        wanted = [name for slot in slots for name in (slot.like, slot.shape) if name and name not in inputs]
        outer = {name for node in graph.node for name in node.output}
        everything = dict.fromkeys([*made, *(name for name in wanted if name in outer)])
        given = [info for info in graph.input if info.name in inputs]
        self._session = session(pruned(model, [*everything], given))
        self._given = {info.name for info in self._session.get_inputs()}
        self._off = {slot.mask: np.full((1,) if slot.loop else (), slot.expected, np.float32) for slot in slots}

    def __call__(self, feeds: Feeds) -> Feeds:
        """Gives every value by its name, the inputs among them."""
        given = {name: value for name, value in {**feeds, **self._off}.items() if name in self._given}
        names = [info.name for info in self._session.get_outputs()]
        found = dict(zip(names, self._run(self._session, names, given), strict=True))
        return {**feeds, **{name: value for name, value in found.items() if isinstance(value, np.ndarray)}}

    def trace(self, feeds: Callable[[Rows], Feeds], rows: Rows, border: Sequence[str], output: str) -> Trace:
        """Finds the sites of rows of one shape, and how everything follows the rows.

        Raises:
            InputError: the graph cannot take the rows.
            ModelRefused: it takes one number of rows only.
        """
        try:
            few, more = self._on(feeds, rows, _FEW), self._on(feeds, rows, _MORE)
        except InputError as error:
            for count in (rows.count, self._exported):  # these fail as well where the shape is to blame
                with suppress(InputError):
                    for row in range(min(rows.count, _MORE)):  # each alone: not only those that are no trouble
                        self._on(feeds, rows.take([row]), count)
                    raise ModelRefused(
                        "the graph takes one number of rows only, so its passes cannot be told from its rows; export "
                        f"it with a dynamic first axis (dynamic_shapes=({{0: torch.export.Dim('rows')}},)): {error}"
                    ) from error
            raise
        shapes, layouts, absent = {}, {}, set()
        for slot in self._slots:
            a, b = self._shape(slot, few), self._shape(slot, more)
            if a and a[0] == ABSENT:
                absent.add(slot.mask)
                a = b = ()
            layouts[slot.mask], shapes[slot.mask] = _axis_of(a, b, slot.path), a
        units = {mask: _unit(shape, layouts[mask]) for mask, shape in shapes.items()}
        sites, of_slot = self._numbered(units, few)
        kinds, trouble = {}, ""
        for name in border:
            kinds[name], why = _follows(few[name], more[name])
            trouble = trouble or (f"{name} {why}" if why else "")
        shared = [slot.path for slot in self._slots if layouts[slot.mask] is None and slot.mask not in absent]
        if shared:
            trouble = trouble or f"the draw of {shared[0]} is shared by all rows"
        trouble = trouble or united(self._model, [slot.mask for slot in self._slots], few, more)
        trouble = trouble or self._numbering(feeds, rows, few, kinds)
        row_bytes = max(_grows(value, more.get(name)) for name, value in few.items())
        dtype = str(few[output].dtype)
        return Trace(sites, of_slot, layouts, units, kinds, trouble, row_bytes, dtype, frozenset(absent))

    def _numbering(
        self, feeds: Callable[[Rows], Feeds], rows: Rows, values: Feeds, kinds: Mapping[str, Axis | None]
    ) -> str:
        """Names a value that holds the numbers of rows, such as to pick from each, so that rows alike differ in it.

        Repeated for the passes it would point at the rows of the first one.
        """
        along = {name: kind.axis for name, kind in kinds.items() if kind is not None and kind.axis is not None}
        places = [name for name in along if name not in self._given and values[name].dtype.name in _PLACES]
        if not places:
            return ""
        try:
            few, more = (self._on(feeds, rows.take([0]), count) for count in (_FEW, _MORE))
        except InputError as error:
            return f"{places[0]} cannot be seen on rows that are alike: {error}"
        numbering = (name for name in places if not _in_proportion(few[name], more[name], along[name]))
        return next((f"{name} holds the numbers of rows" for name in numbering), "")

    def _on(self, feeds: Callable[[Rows], Feeds], rows: Rows, count: int) -> Feeds:
        given = feeds(rows.take(np.arange(count) % rows.count))
        try:
            return self(given)
        except Exception as error:  # the runtime's own errors share no base
            shapes = ", ".join(f"{name}: {('N', *value.shape[1:])}" for name, value in given.items())
            said = str(error).strip().splitlines()[0][:300]
            raise InputError(f"the graph cannot take inputs of shape {shapes}: {said}") from error

    def _shape(self, slot: Slot, values: Feeds) -> tuple[int, ...]:
        """The shape of a slot's draw, in a loop that of one step."""
        if not slot.shape:
            return self._initial.get(slot.like) or tuple(values[slot.like].shape)
        found = values[slot.shape]
        if slot.loop:
            if not len(found):
                raise ModelRefused(f"the loop of {slot.path} takes no step on the example; give rows that it steps for")
            if (found != found[0]).any():
                raise ModelRefused(
                    f"{slot.path} draws at some steps of its loop only, or in another shape at some, so its masks "
                    "cannot be numbered"
                )
            found = found[0]
        return tuple(int(size) for size in found if size != NO_AXIS)

    def _numbered(
        self, units: Mapping[str, tuple[int, ...]], values: Feeds
    ) -> tuple[tuple[Site, ...], dict[str, tuple[str, ...]]]:
        """Numbers the draws in the order in which they happen, those of a loop step by step.

        Loops that may take other numbers of steps on other rows come last and by turns, so that no number depends on
        how many steps were seen.
        """
        sites: list[Site] = []
        of_slot: dict[str, tuple[str, ...]] = {slot.mask: () for slot in self._slots}

        def add(slot: Slot, number: int) -> None:
            shape = units[slot.mask]
            while slot.channels and shape[-1:] == (1,):
                shape = shape[:-1]
            name = f"site{number if slot.site is None else slot.site}"
            sites.append(Site(name, shape, slot.p, slot.kind, slot.path))
            of_slot[slot.mask] = (*of_slot[slot.mask], name)

        steps = {slot.mask: len(values[slot.shape]) if slot.loop else 1 for slot in self._slots}
        varying = [slot for slot in self._slots if slot.loop in self._varying]
        for _, group in groupby([slot for slot in self._slots if slot not in varying], key=lambda slot: slot.loop):
            members = list(group)
            for _ in range(steps[members[0].mask]):
                for slot in members:
                    add(slot, len(sites))
        first = len(sites)
        for step in range(max((steps[slot.mask] for slot in varying), default=0)):
            for place, slot in enumerate(varying):
                if step < steps[slot.mask]:
                    add(slot, first + step * len(varying) + place)
        return tuple(sites), of_slot


def _unit(shape: tuple[int, ...], layout: Axis | None) -> tuple[int, ...]:
    """The shape of what one row draws."""
    if layout is None or layout.axis is None:
        return shape
    own = () if layout.multiple == 1 else (layout.multiple,)
    return (*shape[: layout.axis], *own, *shape[layout.axis + 1 :])


def _axis_of(few: tuple[int, ...], more: tuple[int, ...], path: str) -> Axis | None:
    """Which axis of a draw follows the rows; None where all rows share it."""
    if len(few) != len(more):
        raise ModelRefused(f"the draw of {path} has another number of axes for another number of rows")
    differing = [axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if not differing:
        return None
    axis = differing[0]
    if len(differing) > 1 or few[axis] % _FEW or few[axis] // _FEW * _MORE != more[axis]:
        raise ModelRefused(f"no axis of the draw of {path} follows the rows: {few} for 3 rows, {more} for 5")
    return Axis(axis, few[axis] // _FEW, rank=len(few))


def _grows(value: Array, larger: Array | None) -> int:
    """How many bytes a value grows by with each row."""
    return -(-value.nbytes // _FEW) if larger is None else max(1, (larger.nbytes - value.nbytes) // (_MORE - _FEW))


def _follows(few: Array, more: Array) -> tuple[Axis | None, str]:
    """How a value follows the rows, and why it cannot be repeated if it cannot."""
    if few.shape != more.shape:
        try:
            return _axis_of(few.shape, more.shape, ""), ""
        except ModelRefused:
            return None, "does not follow the rows along one axis"
    if identical(few, more):
        return None, ""
    if few.dtype.kind not in "iu":
        return None, "holds numbers that depend on how many rows there are"
    step, rest = np.divmod(more.astype(np.int64) - few, _MORE - _FEW)
    if rest.any():
        return None, "holds numbers that are not linear in the rows"
    return Axis(None, base=(few - _FEW * step).astype(few.dtype), rank=few.ndim), ""


def _in_proportion(few: Array, more: Array, axis: int) -> bool:
    """Whether three rows and five hold the same along an axis, each number as often for a row; or one number all along.

    Such as how many rows there are: that tells none from another.
    """
    if not any(np.ptp(values, axis=axis).any() for values in (few, more)):
        return True
    return identical(*(np.sort(np.repeat(v, n, axis), axis) for v, n in ((few, _MORE), (more, _FEW))))
