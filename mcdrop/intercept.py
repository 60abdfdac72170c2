"""Draws become masks: a ``TorchFunctionMode`` that replaces every random number inside a forward pass.

The mode is thread-local and touches no module. Each draw gets the next number in order of execution and asks a
``Source`` for its values; with the values given, a forward pass is one deterministic function, so it may be batched
over passes with ``torch.vmap``. While any function mode is active torch leaves the fused transformer path by itself.

To teach it a function that draws, add one rule to ``RULES``: same arguments as the function, after the mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RULES", "Given", "Interception", "Layout", "Source"]

_SELU_FLOOR = -1.7580993408473766  # minus alpha times scale: what SELU tends to (Klambauer et al. 2017, eq. 2)


@dataclass(frozen=True)
class Layout:
    """Which axis of a draw follows the rows, and how many entries of it belong to one row."""

    axis: int
    multiple: int = 1

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Gives the shape of what one row draws."""
        own = () if self.multiple == 1 else (self.multiple,)
        return (*shape[: self.axis], *own, *shape[self.axis + 1 :])

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeats one row's mask over all rows of a draw (broadcast where that is enough)."""
        mask = mask.unsqueeze(self.axis)
        if self.multiple == 1:
            return mask
        rows = shape[self.axis] // self.multiple
        return mask.expand(*shape[: self.axis], rows, self.multiple, *shape[self.axis + 1 :]).reshape(shape)


class Source(Protocol):
    """Where the values of draws come from."""

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives values that broadcast to the shape, or None for the expectation."""


class Given:
    """A source that hands out ready masks, one for each draw in order; None is the expectation."""

    def __init__(self, masks: Sequence[Tensor | None], layouts: Sequence[Layout | None]) -> None:
        """Takes one mask and one layout a draw; a layout of None is a draw that no row owns, such as a weight's."""
        self._masks = masks
        self._layouts = layouts
        self._next = 0

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives the next mask, spread over the rows."""
        index, self._next = self._next, self._next + 1
        if index >= len(self._masks):
            raise RuntimeError(f"draw {index} was not there when this network was traced: its control flow is random")
        mask, layout = self._masks[index], self._layouts[index]
        if mask is None or layout is None:
            return mask
        return layout.spread(mask, shape)


class Interception(TorchFunctionMode):
    """While active, every draw that has a rule takes its values from the source."""

    def __init__(self, source: Source) -> None:
        """Takes the source that answers the draws."""
        super().__init__()
        self.source = source

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the rule of a function that draws, and any other function as it is."""
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(self, *args, **(kwargs or {}))

    def keep(self, like: Tensor, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Gives 0/1 for dropped/kept units in the type of a tensor, or None for the expectation."""
        mask = self.source.draw("bernoulli", shape, p)
        return None if mask is None else mask.to(like.dtype)

    def numbers(self, kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Gives uniform or normal numbers of a shape, in the type and on the device of a tensor."""
        values = self.source.draw(kind, tuple(shape), 0.0)
        if values is None:
            return torch.full(shape, 0.5 if kind == "uniform" else 0.0, dtype=like.dtype, device=like.device)
        # expanded, because the caller asked for a tensor of this shape and may reshape it or write to it
        return values.to(like.device, like.dtype).expand(shape).clone()


def _write(target: Tensor, value: Tensor) -> Tensor:
    """Does an in-place write; under vmap a tensor without the sample axis is swapped for one that has it."""
    try:
        return target.copy_(value)
    except RuntimeError:
        torch.utils.swap_tensors(target, value)
        return target


def _scaled(mode: Interception, x: Tensor, p: float, leading: int, inplace: bool) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014, section 10): kept units are divided by 1 - p."""
    keep = mode.keep(x, tuple(x.shape[:leading]), p)
    if keep is None:
        return x
    factor = keep * (1 / (1 - p) if p < 1 else 0.0)
    value = x * factor.reshape(*factor.shape, *(1,) * (x.dim() - leading))
    return _write(x, value) if inplace else value


def _alpha(mode: Interception, x: Tensor, p: float, leading: int, inplace: bool) -> Tensor:
    """Alpha dropout (Klambauer et al. 2017, section 3): dropped units go to SELU's floor, then moments are restored."""
    keep = mode.keep(x, tuple(x.shape[:leading]), p)
    if keep is None:
        return x
    keep = keep.reshape(*keep.shape, *(1,) * (x.dim() - leading))
    scale = 0.0 if p == 1 else ((1 - p) * (1 + p * _SELU_FLOOR**2)) ** -0.5
    value = scale * (x * keep + _SELU_FLOOR * (1 - keep)) - scale * _SELU_FLOOR * p
    return _write(x, value) if inplace else value


def _check(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _drop_rule(apply: Callable[..., Tensor], leading: int | None, unbatched: int = -1) -> Callable[..., Tensor]:
    """A rule for a function of (input, p, training, inplace).

    ``leading`` says how many axes the mask has (None: all); an input of ``unbatched`` axes has no rows, and one less.
    """

    def rule(mode: Interception, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        _check(p)
        if not training:
            return input
        axes = input.dim() if leading is None else min(leading - (input.dim() == unbatched), input.dim())
        return apply(mode, input, p, axes, inplace)

    return rule


def _torch_rule(apply: Callable[..., Tensor], leading: int | None, inplace: bool) -> Callable[..., Tensor]:
    """A rule for a function of (input, p, train), such as ``torch.dropout``."""
    inner = _drop_rule(apply, leading)

    def rule(mode: Interception, input: Tensor, p: float, train: bool) -> Tensor:
        return inner(mode, input, p, train, inplace)

    return rule


def _rrelu(
    mode: Interception, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    slope: Tensor | float = (lower + upper) / 2
    if training:
        slope = mode.numbers("uniform", tuple(input.shape), input) * (upper - lower) + lower
    value = torch.where(input >= 0, input, input * slope)
    return _write(input, value) if inplace else value


def _bernoulli(mode: Interception, input: Tensor, p: float | Tensor | None = None, **ignored: Any) -> Tensor:
    """``torch.bernoulli(input)`` reads probabilities of one from the input; with ``p`` only its shape counts."""
    chance = input if p is None else p
    if isinstance(chance, Tensor):
        values = mode.source.draw("uniform", tuple(input.shape), 0.0)
        if values is None:
            return chance.to(input.dtype).expand(input.shape).clone()
        return (values.to(input.device) < chance).to(input.dtype)
    values = mode.source.draw("bernoulli", tuple(input.shape), 1 - chance)
    if values is None:
        return torch.full_like(input, chance)
    return values.to(input.device, input.dtype).expand(input.shape).clone()


def _bernoulli_(mode: Interception, input: Tensor, p: float | Tensor = 0.5, **ignored: Any) -> Tensor:
    return _write(input, _bernoulli(mode, input, p))


def _uniform_(mode: Interception, input: Tensor, *args: float, **kwargs: Any) -> Tensor:
    low = args[0] if args else kwargs.get("from", 0.0)
    high = args[1] if len(args) > 1 else kwargs.get("to", 1.0)
    return _write(input, mode.numbers("uniform", tuple(input.shape), input) * (high - low) + low)


def _normal_(mode: Interception, input: Tensor, mean: float = 0.0, std: float = 1.0, **ignored: Any) -> Tensor:
    return _write(input, mode.numbers("normal", tuple(input.shape), input) * std + mean)


def _exponential_(mode: Interception, input: Tensor, lambd: float = 1.0, **ignored: Any) -> Tensor:
    return _write(input, -torch.log1p(-mode.numbers("uniform", tuple(input.shape), input)) / lambd)


def _normal(mode: Interception, mean: Tensor | float, std: Tensor | float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    like = tensors[0] if tensors else _blank(kwargs)
    size = args[0] if args else kwargs.get("size")
    shape = tuple(size) if size else tuple(torch.broadcast_shapes(*(value.shape for value in tensors)))
    return mode.numbers("normal", shape, like) * std + mean


def _like_rule(kind: str) -> Callable[..., Tensor]:
    def rule(mode: Interception, input: Tensor, **kwargs: Any) -> Tensor:
        return mode.numbers(kind, tuple(input.shape), _blank(kwargs, input))

    return rule


def _size_rule(kind: str) -> Callable[..., Tensor]:
    def rule(mode: Interception, *size: Any, **kwargs: Any) -> Tensor:
        given = kwargs.get("size", size)
        shape = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
        return mode.numbers(kind, tuple(int(n) for n in shape), _blank(kwargs))

    return rule


def _randint(mode: Interception, *args: Any, **kwargs: Any) -> Tensor:
    bounds = [*args[:-1]] if "size" not in kwargs else [*args]
    size = kwargs["size"] if "size" in kwargs else args[-1]
    low, high = (0, bounds[0]) if len(bounds) == 1 else (bounds[0], bounds[1])
    blank = torch.empty(0, device=kwargs.get("device"))
    values = torch.floor(mode.numbers("uniform", tuple(size), blank) * (high - low)) + low
    return values.to(kwargs.get("dtype") or torch.int64)


def _blank(kwargs: dict[str, Any], like: Tensor | None = None) -> Tensor:
    """An empty tensor with the type and device that the arguments of a factory function ask for."""
    dtype = kwargs.get("dtype") or (like.dtype if like is not None else None)
    device = kwargs.get("device") or (like.device if like is not None else None)
    return torch.empty(0, dtype=dtype, device=device)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _drop_rule(_scaled, None),
    F.dropout1d: _drop_rule(_scaled, 2, unbatched=2),
    F.dropout2d: _drop_rule(_scaled, 2),
    F.dropout3d: _drop_rule(_scaled, 2, unbatched=4),
    F.alpha_dropout: _drop_rule(_alpha, None),
    F.feature_alpha_dropout: _drop_rule(_alpha, 2),
    F.rrelu: _rrelu,
    torch.dropout: _torch_rule(_scaled, None, inplace=False),
    torch.dropout_: _torch_rule(_scaled, None, inplace=True),
    torch.feature_dropout: _torch_rule(_scaled, 2, inplace=False),
    torch.feature_dropout_: _torch_rule(_scaled, 2, inplace=True),
    torch.alpha_dropout: _torch_rule(_alpha, None, inplace=False),
    torch.alpha_dropout_: _torch_rule(_alpha, None, inplace=True),
    torch.feature_alpha_dropout: _torch_rule(_alpha, 2, inplace=False),
    torch.feature_alpha_dropout_: _torch_rule(_alpha, 2, inplace=True),
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    Tensor.exponential_: _exponential_,
    torch.normal: _normal,
    torch.rand: _size_rule("uniform"),
    torch.randn: _size_rule("normal"),
    torch.rand_like: _like_rule("uniform"),
    torch.randn_like: _like_rule("normal"),
    torch.randint: _randint,
}
