"""Passes of an ONNX graph on onnxruntime: the draws are inputs, so the runtime computes and never draws.

The part before the first mask runs once for a batch of rows. What follows is run for all passes at a time, the rows
repeated (``fold``). Both ways are tried on the same masks with some rows when a shape is first seen; where that does
not give what passes one after the other give (``loop``), the loop is what runs. Nothing depends on optimiser levels,
providers or the runtime's seeds.
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mcdrop.agreement import difference, identical
from mcdrop.backends import Plain
from mcdrop.drawn import Drawn, LatestMasks
from mcdrop.errors import InputError, UnknownName
from mcdrop.masks import Site, sample_masks
from mcdrop.onnx_bodies import LOOPS
from mcdrop.onnx_feeds import fold_rows, mask_feed
from mcdrop.onnx_graph import pruned, split, walk
from mcdrop.onnx_inputs import fed, hidden
from mcdrop.onnx_orders import ordered
from mcdrop.onnx_sessions import attempted, described, ended, session
from mcdrop.onnx_slots import Slot
from mcdrop.onnx_trace import Observer, Trace
from mcdrop.quiet import first_line
from mcdrop.rows import Rows
from mcdrop.telling import telling

__all__ = ["OnnxBackend"]

CHUNK_BYTES = 16 * 2**20
_CHECK_PASSES, _CHECK_ROWS = 3, 4
_MORE_LOOKS = 8  # at as many rows, where masks do not move the first ones
_MASK_BYTES = 64 * 2**20
_TOLERANCE = {"float16": 1e-2, "float32": 3e-5, "float64": 1e-12}

Array = NDArray[Any]
Outputs = NDArray[np.floating[Any]]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class _Plan:
    """How passes of one input signature are run."""

    trace: Trace
    tier: str
    reason: str


class OnnxBackend:
    """A graph with its draws as inputs; safe to use from several threads at once."""

    chunk_bytes = CHUNK_BYTES

    def __init__(
        self, model: "onnx.ModelProto", slots: Sequence[Slot], output: str, *, digest: str, layers: Mapping[str, str],
        exported: int = 1,
    ) -> None:  # fmt: skip
        """Takes a graph that ``masks_as_inputs`` changed, its slots and the output to read.

        ``digest`` is the sha256 of the graph as it was, ``layers`` maps the names of nodes to their first outputs,
        ``exported`` is the number of rows that it was exported for where that is one.
        """
        self.slots = tuple(slots)
        self.model, self.output = model, output
        self._digest, self._layers = digest, layers
        loops = any(place.node.op_type in LOOPS for place in walk(model.graph))
        self._attempted = partial(attempted, loops=loops)
        masks = {slot.mask for slot in slots}
        self.inputs = [info for info in model.graph.input if info.name not in masks]
        self._border, _ = split(model, masks)
        names = {info.name for info in self.inputs}
        made = [name for name in self._border if name not in names]
        self._before = session(pruned(model, made)) if made else None
        between = [] if self._before is None else [described(one) for one in self._before.get_outputs()]
        given = [info for info in model.graph.input if info.name in {*self._border, *masks}]
        self._after = session(pruned(model, [output], [*given, *between]))
        self._takes = {info.name for info in self._after.get_inputs()}
        self._exported = exported
        self._observer: Observer | None = None
        self._plans: dict[object, _Plan] = {}
        self._masks = LatestMasks(_MASK_BYTES)
        self._lock = threading.Lock()
        self._last = threading.local()

    # -- the Backend protocol --

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> Outputs:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...)."""
        plan = self.plan(rows)
        drawn = self._masks.get(plan.trace.sites, passes, seed=seed, start=start, sampler=sampler)
        return self.run(rows, drawn, passes, plan.trace, plan.tier)

    def deterministic(self, rows: Rows) -> Outputs:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""
        outputs: Outputs = self.run(rows, {}, 1, self.plan(rows).trace, "loop")[0]
        return outputs

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives the first output of a named node, or the hidden value of the graph, with draws off: (N, F)."""
        if layer is not None and layer not in self._layers:
            raise UnknownName("layer", layer, self._layers)
        value = hidden(self.model) if layer is None else self._layers[layer]
        found = self._observe(self._feeds(rows)).get(value)
        if found is None or found.ndim == 0 or len(found) != rows.count:
            raise InputError(f"layer {layer or value!r} does not keep the rows on its first axis")
        features: NDArray[np.float32] = found.reshape(rows.count, -1).astype(np.float32)
        return features

    def sites(self, rows: Rows) -> tuple[Site, ...]:
        """Gives the draws of a pass."""
        return self.plan(rows).trace.sites

    def digest(self) -> str:
        """Gives the sha256 of the graph as it was read."""
        return self._digest

    def block(self, rows: Rows, *, exact_last: bool = False, rides: bool = True) -> Plain:
        """Gives rows ready for passes.

        Raises:
            InputError: the last layer is asked for in closed form.
        """
        if exact_last:
            raise InputError("exact_last needs a torch network; an ONNX graph is sampled as it is")
        return Plain(self, rows)

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs: some four of its largest values are alive at a time."""
        return 4 * self.plan(rows).trace.row_bytes

    def pass_bytes(self, rows: Rows) -> int:
        """Gives what a further pass of one row needs."""
        return self.row_bytes(rows)

    def shared_bytes(self, rows: Rows) -> int:
        """Gives what a further pass needs besides, for all rows together."""
        return 4 * self.plan(rows).trace.shared_bytes

    # -- one layer down --

    def plan(self, rows: Rows) -> _Plan:
        """Gives how rows of such shapes are run; traced and checked when they are first seen."""
        feeds = self._feeds(rows)
        signature = tuple((name, value.shape[1:]) for name, value in feeds.items())
        plan = self._plans.get(signature)
        if plan is None:
            with self._lock:
                plan = self._plans.get(signature)
                if plan is None:
                    plan = self._plans[signature] = self._make_plan(rows)
        return plan

    def folds(self, rows: Rows) -> bool:
        """Whether the rows can be repeated for the passes; found out when rows of such shapes are first seen."""
        return self.plan(rows).tier == "fold"

    def tier(self, rows: Rows) -> tuple[str, str]:
        """Gives the tier that runs the passes of such rows, and why."""
        plan = self.plan(rows)
        return plan.tier, plan.reason

    def run(self, rows: Rows, drawn: Drawn, passes: int, trace: Trace, tier: str) -> Outputs:
        """Runs passes with given draws; those of other sites are at their expectations: (T, N, ...)."""
        border = self._at_border(rows)
        if tier == "fold":
            feeds = {name: fold_rows(value, trace.border[name], passes) for name, value in border.items()}
            masks = {slot.mask: mask_feed(slot, trace, drawn, rows.count, None) for slot in self.slots}
            folded = self._random({**feeds, **masks})
            return self._checked(folded.reshape(passes, rows.count, *folded.shape[1:]), rows)
        each = []
        for t in range(passes):
            masks = {slot.mask: mask_feed(slot, trace, drawn, rows.count, t) for slot in self.slots}
            each.append(self._random({**border, **masks}))
        return self._checked(np.stack(each), rows)

    # -- inside --

    def _random(self, feeds: Feeds) -> Array:
        output: Array = self._attempted(
            self._after, [self.output], {k: v for k, v in feeds.items() if k in self._takes}
        )[0]
        return output

    def _checked(self, outputs: Array, rows: Rows) -> Outputs:
        if outputs.ndim == 1:
            raise InputError(f"the output {self.output!r} is one number for all rows; its first axis must be the rows")
        if outputs.shape[1] != rows.count:
            raise InputError(
                f"the output has {outputs.shape[1]} rows for {rows.count}; its first axis must be the rows"
            )
        exact = np.can_cast(outputs.dtype, np.float32)  # else it would round outputs
        found: Outputs = outputs.astype(np.float32 if exact else np.float64)
        return found[..., None] if found.ndim == 2 else found

    def _feeds(self, rows: Rows) -> Feeds:
        return {info.name: fed(leaf, info) for info, leaf in zip(self.inputs, rows.leaves, strict=True)}

    def _at_border(self, rows: Rows) -> Feeds:
        """What the random part takes, made once for a batch of rows and kept for the chunks of passes that follow."""
        last = getattr(self._last, "held", None)
        if last is not None and last[0]() is rows:
            kept: Feeds = last[1]
            return kept
        feeds = self._feeds(rows)
        border = {name: feeds[name] for name in self._border if name in feeds}
        if self._before is not None:
            taken = {info.name: feeds[info.name] for info in self._before.get_inputs()}
            made = [info.name for info in self._before.get_outputs()]
            border |= dict(zip(made, self._attempted(self._before, made, taken), strict=True))
        self._last.held = (weakref.ref(rows), border)
        return border

    def _observe(self, feeds: Feeds) -> Feeds:
        return self._observed()(feeds)

    def _observed(self) -> Observer:
        if self._observer is None:
            self._observer = Observer(self.model, self.slots, session, ended, self._exported)
        return self._observer

    def _make_plan(self, rows: Rows) -> _Plan:
        found = self._observed().trace(lambda few: self._feeds(few), rows, self._border, self.output)
        trace = ordered(found, rows, self.run, _TOLERANCE.get(found.dtype, 3e-5))
        drawn = sample_masks(trace.sites, _CHECK_PASSES, seed=0)
        if trace.unfoldable:
            self.run(rows.take(slice(_CHECK_ROWS)), drawn, _CHECK_PASSES, trace, "loop")
            return _Plan(trace, "loop", trace.unfoldable)
        # a drop may be so rare that none of the passes has one: two more in which every unit differs
        half = telling(trace.sites, 1, seed=0)
        drawn = {name: np.concatenate([some, half[name], 1 - half[name]]) for name, some in drawn.items()}
        for look in _looks(rows.count):
            moved, trouble = self._folded(rows.take(look), drawn, trace)
            if trouble:
                return _Plan(trace, "loop", trouble)
            if moved:
                return _Plan(trace, "fold", "equals the loop; what comes before the first draw is run once")
        return _Plan(trace, "loop", "no mask that was tried changes the output, so fold could not be told")

    def _folded(self, few: Rows, drawn: Drawn, trace: Trace) -> tuple[bool, str]:
        """Whether the masks change the answers to some rows, and why their passes cannot share a batch if they cannot.

        Usual and telling passes are each judged by how far they move: at the ends of its numbers noise such as 1 / u
        goes so far that nothing else would count.
        """
        passes = _CHECK_PASSES + 2
        expected = self.run(few, drawn, passes, trace, "loop")
        try:
            got = self.run(few, drawn, passes, trace, "fold")
        except Exception as error:  # whatever a graph does with more rows, the loop is right
            return False, f"fold does not take this graph: {first_line(error)}"
        kinds = slice(_CHECK_PASSES), slice(_CHECK_PASSES, None)
        worst = max(difference(got[kind], expected[kind], passes=expected[kind]) for kind in kinds)
        if not worst <= _TOLERANCE.get(trace.dtype, 3e-5):
            return False, f"fold differs from the loop by {worst:.1e}"
        return not all(identical(one, expected[0]) for one in expected), ""


def _looks(count: int) -> list[NDArray[np.intp]]:
    """Which rows are looked at, in turn until masks move some: the first, then others, such as behind padding."""
    first, spaced = np.arange(min(count, _CHECK_ROWS)), np.linspace(0, count - 1, _CHECK_ROWS * _MORE_LOOKS)
    others = np.setdiff1d(spaced.astype(np.intp), first)
    looks = min(_MORE_LOOKS, -(-len(others) // _CHECK_ROWS))
    return [first, *(np.append(first[:1], others[k::looks]) for k in range(looks))]  # never one alone
