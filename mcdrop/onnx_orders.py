"""In which order the entries of a row stand in the draws of an ONNX graph that have several for each row."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.agreement import told_orders, uneven
from mcdrop.errors import ModelRefused
from mcdrop.masks import sample_masks
from mcdrop.onnx_trace import Trace
from mcdrop.rows import Rows
from mcdrop.telling import telling

__all__ = ["ordered"]

_TOLD_BY = 8  # passes whose masks are not all the same at two entries
_LOOSE = 3  # other kernels are chosen for other numbers of rows


def ordered(trace: Trace, rows: Rows, run: Callable[..., NDArray[Any]], tolerance: float) -> Trace:
    """Tells how the entries of a row stand, where a draw has several: by a row that stands there many times.

    Raises:
        ModelRefused: no order fits.
    """
    if not trace.several:
        return trace
    usual, even = sample_masks(trace.sites, _TOLD_BY, seed=0), telling(trace.sites, _TOLD_BY, seed=0)
    several, drawn = trace.several, {name: np.concatenate([some, even[name]]) for name, some in usual.items()}

    def differs(outer: Mapping[str, int], on: frozenset[str], counts: Sequence[int]) -> bool | None:
        some = {name: drawn[name] for mask in on for name in trace.of_slot[mask]}
        given = some, 2 * _TOLD_BY, trace.placed(outer), "loop"
        with suppress(Exception):  # whatever a graph does with so many rows
            for row in range(min(2, rows.count)):
                passes = np.concatenate([run(rows.take([row] * count), *given) for count in counts], axis=1)
                # each by its own scale: at the ends of its numbers noise such as 1 / u goes so far that it hides others
                if not max(map(uneven, np.split(passes, 2))) <= _LOOSE * tolerance:
                    return True
            return False
        return None

    told = told_orders(several, differs)
    if told is None:
        paths = ", ".join(
            dict.fromkeys(s.path for s in trace.sites if any(s.name in trace.of_slot[m] for m in several))
        )
        raise ModelRefused(
            f"which entries of the draws of {paths} belong to which row could not be told; wrap the torch network"
        )
    return trace.placed(told)
