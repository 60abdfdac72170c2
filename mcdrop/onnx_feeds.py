"""What the random part of an ONNX graph is fed: values repeated for the passes, masks in the layout of their draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.onnx_bodies import none_drawn, of_steps
from mcdrop.onnx_slots import Slot
from mcdrop.onnx_trace import Axis, Trace

__all__ = ["fold_rows", "mask_feed"]

Array = NDArray[Any]


def fold_rows(value: Array, kind: Axis | None, passes: int) -> Array:
    """Repeats a value for the passes: all rows of the first pass, then all rows of the second."""
    if kind is None:
        return value
    if kind.axis is None:
        return np.asarray(kind.base + passes * (value - kind.base), value.dtype)
    return np.concatenate([value] * passes, axis=kind.axis)


def mask_feed(slot: Slot, trace: Trace, drawn: Mapping[str, Array], rows: int, only: int | None) -> Array:
    """Gives what a slot's input is fed: for one pass, or (``only`` None) for all passes of repeated rows."""
    names = trace.of_slot[slot.mask]
    if slot.mask in trace.absent:  # the run ends if its branch runs after all
        return none_drawn(bool(slot.loop))
    steps = [_one_feed(slot, trace, drawn.get(name), rows, only) for name in names]
    return of_steps(steps) if slot.loop else steps[0]


def _one_feed(slot: Slot, trace: Trace, numbers: Array | None, rows: int, only: int | None) -> Array:
    if numbers is None:
        return np.asarray(slot.expected, np.float32)
    if only is not None:
        numbers = numbers[only : only + 1]
    values, layout = slot.values(numbers).reshape(-1, *trace.units[slot.mask]), trace.layouts[slot.mask]
    if layout is None or layout.axis is None:
        assert only is not None, "a draw that all rows share is looped over"
        return np.asarray(values[0])
    axis, own = layout.axis, layout.multiple > 1
    if only is not None:
        if not own:
            return np.expand_dims(values[0], axis)
        mask = values[0]
        split = layout.outer, 1, layout.multiple // layout.outer
        mask = mask.reshape(*mask.shape[:axis], *split, *mask.shape[axis + 1 :])
        return _merged(mask, axis, axis + 1, rows, axis + 3)
    stack = np.expand_dims(np.moveaxis(values, 0, axis), axis + 1)
    return _merged(stack, axis, axis + 1, rows, axis + 2 + own)


def _merged(values: Array, first: int, axis: int, rows: int, stop: int) -> Array:
    """Repeats the axis of size 1 for the rows, and merges the axes from ``first`` up to ``stop`` into one."""
    shape = [*values.shape]
    shape[axis] = rows
    return np.broadcast_to(values, shape).reshape(*shape[:first], -1, *shape[stop:])
