"""Units that are 0 in all rows of a block, as a ReLU leaves them, are left out of a product.

Before the first draw a unit is the same in all passes, and what is 0 there adds nothing to any of them. Of one row's
units a ReLU leaves about half, of many rows all but those that never fire.
"""

import torch
from torch import Tensor

__all__ = ["Active", "active_linear"]

# What leaving units out costs, in multiplications of a product: two cores with AVX-512 do some 120 in a nanosecond
_GATHERED = 40  # a number that is gathered
_LOOKED = 1_200_000  # finding them
_MOST = 2**24  # weights that are gathered


class Active:
    """A block of rows (N, F) in front of a layer's weight (D, F), and what is left of both without such units."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        """Takes both; units are looked at when many passes are asked for."""
        self._hidden, self._turned = hidden, weight.t()
        self._units: Tensor | None = None
        self._left: tuple[Tensor, Tensor, Tensor] | None = None

    def product(self, factor: Tensor) -> Tensor:
        """Gives the product of all passes: (T * N, D) of factors (T, 1, F)."""
        units, hidden, turned = self._worth(len(factor)) or (None, self._hidden, self._turned)
        if units is not None:  # two axes gather five times as fast as three
            factor = factor[:, 0].index_select(1, units)[:, None]
        return torch.mm((hidden * factor).reshape(-1, hidden.shape[1]), turned)

    def _worth(self, passes: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The units that are left, and rows and weights of them, where so many passes are worth gathering them."""
        if self._left is not None:
            return self._left
        (rows, all_units), width = self._hidden.shape, self._turned.shape[1]
        each = passes * rows * width
        if each * all_units < 2 * _LOOKED:
            return None
        if self._units is None:
            self._units = self._hidden.any(0).nonzero()[:, 0]
        active = self._units.shape[0]
        costs = _GATHERED * active * (width + passes) + _LOOKED
        if each * (all_units - active) > costs and active * width <= _MOST:
            # through the untransposed weight, whose numbers lie in order
            weight = self._turned.t().index_select(1, self._units)
            self._left = self._units, self._hidden.index_select(1, self._units), weight.t()
        return self._left


def active_linear(active: Active, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Gives a layer's output of all passes: (T, N, D)."""
    output = active.product(factor)
    if bias is not None:
        output.add_(bias)
    return output.reshape(len(factor), -1, output.shape[1])
