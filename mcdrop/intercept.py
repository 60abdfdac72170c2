"""Draws become masks: a ``TorchFunctionMode`` that replaces every random number inside a forward pass.

The mode is thread-local and touches no module. Each draw gets the next number in order of execution and asks a
``Source`` for its values; with the values given, a forward pass is one deterministic function, so it may be batched
over passes with ``torch.vmap``. While any function mode is active torch leaves the fused transformer path by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from mcdrop.errors import ModelRefused, UncontrolledDraw
from mcdrop.layouts import Layout
from mcdrop.masks import Site
from mcdrop.registry import TAUGHT_FUNCTIONS
from mcdrop.standing import as_views, is_shared

__all__ = [
    "PACKED", "EachRow", "Expected", "Folded", "Given", "Interception", "LargerDraw", "Rules", "Source", "result",
]  # fmt: skip

Rules = Mapping[Callable[..., Any], Callable[..., Any]]

_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__", "__ixor__", "__setitem__"}
_NOT_BATCHED = ("vmap", "match the broadcast shape", "Batching rule")  # what torch says of a target without the axis
PACKED = "packed rows are put in order of their lengths, whichever pass they belong to"
_OUT_OF_SIGHT = (
    "the network calls torch's {!r}, whose functions run out of sight, so that a draw in them could not be controlled; "
    "write it with operations instead, such as torch.where or scaled_dot_product_attention"
)
_OTHER_WAY = "the network takes another way through these rows than through its example"
_REMEDY = (
    "; to sample these, wrap the network with an example of rows that go this way; where a draw says whether a layer "
    "runs, run it always and let the draw be a factor: x + keep * layer(x); where it says how often, as in an adaptive "
    "solver, take a fixed number of steps"
)
_SELU_FLOOR = -1.7580993408473766  # minus alpha times scale: what SELU tends to (Klambauer et al. 2017, eq. 2)


class LargerDraw(UncontrolledDraw):
    """A draw is larger than when the network was traced, as where a packed sequence is longer: trace again."""


class Source(Protocol):
    """Where the values of draws come from."""

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives values that broadcast to the shape, or None for the expectation."""

    def forces(self, p: float) -> bool:
        """Whether a dropout call that is switched off drops all the same."""

    @property
    def lift(self) -> Tensor | None:
        """A zero that carries the sample axis of a batch of passes; None where there is none."""


class Expected:
    """A source that answers every draw with its expectation: as if nothing were random."""

    lift: Tensor | None = None

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives the expectation."""
        return None

    def forces(self, p: float) -> bool:
        """Forces nothing."""
        return False


class Given:
    """A source that hands out ready masks, one for each draw in order; None is the expectation.

    ``forced`` holds the numbers of the switched-off dropout calls, in order, that drop all the same; ``rates`` those of
    the dropouts whose rate is only known when they are reached, so that their masks are uniform numbers.
    """

    def __init__(
        self,
        masks: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
        forced: frozenset[int] = frozenset(),
        rates: frozenset[int] = frozenset(),
        sites: Sequence[Site] = (),
        rows: int | None = None,
    ) -> None:
        """Takes one mask, one layout and one site a draw, and the number of rows where it is known.

        A layout of None is a draw that no row owns, such as a weight's.
        """
        self._sites, self._rows = sites, rows
        self._masks = masks
        self._layouts = layouts
        self._forced = forced
        self._rates = rates
        self._next = 0
        self._off = 0

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives the next mask, spread over the rows."""
        index, mask, layout = self._take(kind, shape, p)
        if mask is None:
            return None
        if index in self._rates:
            mask = (mask >= p).float()
        return mask if layout is None else layout.spread(mask, shape)

    def _take(self, kind: str, shape: tuple[int, ...], p: float) -> tuple[int, Tensor | None, Layout | None]:
        """Gives the next number, mask and layout.

        Raises:
            UncontrolledDraw: the draw is not the one that stood here when the network was traced.
        """
        index, self._next = self._next, self._next + 1
        if index >= len(self._masks):
            raise UncontrolledDraw(f"{_OTHER_WAY}: a draw of {kind} {shape} is one too many{_REMEDY}")
        layout, mask = self._layouts[index], self._masks[index]
        unit = shape if layout is None else layout.unit_shape(shape)
        if self._sites:
            site = self._sites[index]
            same = index in self._rates or (kind, p) == (site.kind, site.p)
            if not same or len(shape) != len(site.shape) + (layout is not None and layout.multiple == 1):
                was, now = (f"{site.kind} {site.shape} p={site.p:g}", f"{kind} {unit} p={p:g}")
                raise UncontrolledDraw(f"{_OTHER_WAY}: {site.name} was {was}, now {now}{_REMEDY}")
        if layout is not None:
            layout.check(shape, self._rows)
        if self._sites:
            if any(size > most for size, most in zip(unit, site.shape, strict=True)):
                raise LargerDraw(f"{_OTHER_WAY}: {site.name} had the shape {site.shape}, now {unit}")
            if mask is not None and unit != site.shape:  # the smaller mask is the corner of the larger one
                corner: tuple[Any, ...] = (..., *(slice(size) for size in unit))
                mask = mask[corner]
        return index, mask, layout

    def finish(self) -> None:
        """Checks that every mask was asked for.

        Raises:
            UncontrolledDraw: the pass made fewer draws than the trace.
        """
        if self._next < len(self._masks):
            fewer = f"{self._next} draws where the example had {len(self._masks)}"
            raise UncontrolledDraw(f"{_OTHER_WAY}: {fewer}{_REMEDY}")

    def forces(self, p: float) -> bool:
        """Counts the switched-off dropout calls and forces the chosen ones."""
        index, self._off = self._off, self._off + 1
        return index in self._forced

    @property
    def lift(self) -> Tensor | None:
        """A zero made from the first mask, so that it is batched under vmap as the masks are."""
        mask = next((mask for mask in self._masks if mask is not None), None)
        return None if mask is None else mask.reshape(-1)[0] * 0


class EachRow(Given):
    """The same for a batch whose rows have masks of their own, as in training: (N, ...), or (1, ...) where shared."""

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives the next masks, each spread over its part of the batch."""
        index, masks, layout = self._take(kind, shape, p)
        if masks is None:
            return None
        if index in self._rates:
            masks = (masks >= p).float()
        if layout is None:
            return masks[0]
        passes, axis = len(masks), layout.axis + 1
        rows = shape[layout.axis] // layout.multiple // passes
        spread = layout.opened(masks, 1).movedim(0, axis)
        return spread.expand(*spread.shape[: axis + 1], rows, *spread.shape[axis + 2 :]).reshape(shape)


class Folded(EachRow):
    """The same for a batch in which the rows stand once for each pass, pass after pass: masks are (T, ...)."""

    packed = False  # whether rows were put in order of their lengths, whichever pass they belong to

    def _take(self, kind: str, shape: tuple[int, ...], p: float) -> tuple[int, Tensor | None, Layout | None]:
        index, masks, layout = super()._take(kind, shape, p)
        if masks is not None and layout is None:
            raise RuntimeError("a draw that all rows share cannot differ between the rows of a batch")
        if masks is not None and layout is not None and self.packed and layout.multiple > 1:
            raise ModelRefused(PACKED)
        return index, masks, layout


class Interception(TorchFunctionMode):
    """While active, every draw that has a rule takes its values from the source.

    A rule is a function with the arguments of the function that it replaces, after the mode.
    """

    def __init__(self, source: Source, rules: Rules) -> None:
        """Takes the source that answers the draws, and the rules by function."""
        super().__init__()
        self.source = source
        self.rules = rules

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the rule of a function that draws, and any other function as it is."""
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None:
            return rule(self, *args, **kwargs)
        taught = TAUGHT_FUNCTIONS.get(func) if TAUGHT_FUNCTIONS else None
        if taught is not None:
            with self:  # its own draws become masks
                return taught(*args, **kwargs)
        try:
            return as_views(func(*args, **kwargs), args)
        except RuntimeError as error:
            if isinstance(func, HigherOrderOperator) and isinstance(error, NotImplementedError):
                raise ModelRefused(_OUT_OF_SIGHT.format(func.name())) from error
            if not any(said in str(error) for said in _NOT_BATCHED):
                raise
            return self._lifted(func, args, kwargs)

    def _lifted(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Redoes an in-place write whose target lacks the sample axis that the value has."""
        name = getattr(func, "__name__", "")
        lift = self.source.lift
        target = kwargs.get("out")
        if lift is not None and isinstance(target, Tensor) and not is_shared(target):
            result = func(*args, **{key: value for key, value in kwargs.items() if key != "out"})
            torch.utils.swap_tensors(target, result.to(target.dtype))
            return target
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))
        # others that look at its memory would keep the old one: left to fail, and to a tier that needs no sample axis
        if lift is not None and in_place and isinstance(args[0], Tensor) and not is_shared(args[0]):
            zero = lift.to(args[0].dtype)
            torch.utils.swap_tensors(args[0], args[0] | zero if args[0].dtype == torch.bool else args[0] + zero)
        return func(*args, **kwargs)

    def write(self, target: Tensor, value: Tensor) -> Tensor:
        """Does an in-place write; a target without the sample axis is swapped for one that has it."""
        try:
            return target.copy_(value)
        except RuntimeError:
            if is_shared(target):
                raise
        torch.utils.swap_tensors(target, value)
        return target

    def numbers(self, kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Gives uniform or normal numbers of a shape, in the type and on the device of a tensor.

        Of complex ones both parts are drawn, normal ones with half of the variance, as torch does.
        """
        if like.dtype.is_complex:
            parts = self.numbers(kind, (*shape, 2), like.real) * (0.5**0.5 if kind == "normal" else 1.0)
            return torch.complex(parts[..., 0], parts[..., 1])
        values = self.source.draw(kind, tuple(shape), 0.0)
        if values is None:
            return torch.full(shape, 0.5 if kind == "uniform" else 0.0, dtype=like.dtype, device=like.device)
        if kind == "uniform" and torch.finfo(like.dtype).bits < 32:  # rounded, some would be 1
            steps = 2 / torch.finfo(like.dtype).eps
            values = (values * steps).floor() / steps
        # expanded, because the caller asked for a tensor of this shape and may reshape it or write to it
        return values.to(like.device, like.dtype).expand(shape).clone()

    def drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Inverted dropout (Srivastava et al. 2014, section 10): kept units are divided by 1 - p.

        The mask has the first ``leading`` axes of the tensor (None: all).
        """
        keep = self._keep(x, p, x.dim() if leading is None else leading)
        return result(x) if keep is None else x * (keep * (1 / (1 - p) if p < 1 else 0.0))

    def alpha_drop(self, x: Tensor, p: float, leading: int | None = None) -> Tensor:
        """Alpha dropout: dropped units go to SELU's floor, and moments are restored (Klambauer et al. 2017, sec. 3)."""
        keep = self._keep(x, p, x.dim() if leading is None else leading)
        if keep is None:
            return result(x)
        scale = 0.0 if p == 1 else ((1 - p) * (1 + p * _SELU_FLOOR**2)) ** -0.5
        return scale * (x * keep + _SELU_FLOOR * (1 - keep)) - scale * _SELU_FLOOR * p

    def _keep(self, x: Tensor, p: float, leading: int) -> Tensor | None:
        keep = self.source.draw("bernoulli", tuple(x.shape[:leading]), p)
        return None if keep is None else keep.to(x.dtype).reshape(*keep.shape, *(1,) * (x.dim() - leading))


def result(x: Tensor) -> Tensor:
    """Gives a tensor as what an operation gives: a parameter would be registered wherever a module keeps it."""
    return x.detach() if isinstance(x, nn.Parameter) else x
