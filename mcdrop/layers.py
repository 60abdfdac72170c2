"""Stochastic layers that torch lacks, for building and training; each draws only in training mode.

mcdrop needs no list of them: it finds their draws as it finds those of any other layer. None couples the rows of a
batch, so a row's answer does not depend on its neighbours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ConcreteDropout",
    "DropBlock2d",
    "DropConnect",
    "StochasticDepth",
    "drop_block2d",
    "drop_weights",
    "stochastic_depth",
]


def _checked(p: float) -> float:
    if not 0 <= p < 1:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    return p


def drop_block2d(x: Tensor, p: float, block_size: int, training: bool) -> Tensor:
    """Drops square blocks of feature maps (N, C, H, W); see ``DropBlock2d``."""
    if not training or p == 0:
        return x
    height, width = x.shape[-2:]
    size = min(block_size, height, width)
    places = (height - size + 1) * (width - size + 1)
    gamma = min(1.0, p * height * width / (size**2 * places))
    shape = (*x.shape[:2], height - size + 1, width - size + 1)
    starts = torch.bernoulli(torch.full(shape, gamma, dtype=x.dtype, device=x.device))
    covered = F.max_pool2d(F.pad(starts, [size - 1] * 4), size, stride=1)
    keep = 1 - covered
    kept = keep.mean(dim=(1, 2, 3), keepdim=True)
    return x * keep / kept.clamp_min(1 / keep[0].numel())


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drops a whole branch (N, ...) for a row; see ``StochasticDepth``."""
    rows = x.new_ones(x.shape[0], *(1,) * (x.dim() - 1))
    return x * F.dropout(rows, p, training)


def drop_weights(layer: nn.Linear | nn.Conv2d, x: Tensor, p: float, training: bool) -> Tensor:
    """Gives a layer's output with some of its weights dropped; see ``DropConnect``."""
    weight = F.dropout(layer.weight, p, training)
    if isinstance(layer, nn.Conv2d):
        convolved: Tensor = layer._conv_forward(x, weight, layer.bias)
        return convolved
    return F.linear(x, weight, layer.bias)


class DropConnect(nn.Module):
    """Drops single weights of a Linear or Conv2d layer instead of its outputs (Wan et al. 2013).

    The layer itself is kept: its trained weights, bias, stride and all. Kept weights are divided by 1 - p; all rows of
    a batch share one mask.

    Raises:
        TypeError: the layer is neither Linear nor Conv2d.
        ValueError: p is outside [0, 1).
    """

    def __init__(self, layer: nn.Module, p: float = 0.5) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"DropConnect takes a Linear or Conv2d layer, got {type(layer).__name__}")
        self.layer = layer
        self.p = _checked(p)

    def forward(self, x: Tensor) -> Tensor:
        """Gives the layer's output with some of its weights dropped in training."""
        return drop_weights(self.layer, x, self.p, self.training)

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"p={self.p}"


class DropBlock2d(nn.Module):
    """Drops square blocks of feature maps (Ghiasi, Lin and Le 2018), (N, C, H, W).

    Each place where a whole block fits starts one with probability gamma (their eq. 1), so that about the share p is
    dropped. What is left is rescaled row by row, not over the whole batch as in the paper, so that rows stay apart.

    Raises:
        ValueError: p is outside [0, 1), or the block size is below 1.
    """

    def __init__(self, p: float = 0.1, block_size: int = 7) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.p = _checked(p)
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """Gives the feature maps with blocks dropped in training."""
        return drop_block2d(x, self.p, self.block_size, self.training)

    def extra_repr(self) -> str:
        """Shows the rate and the block size."""
        return f"p={self.p}, block_size={self.block_size}"


class StochasticDepth(nn.Module):
    """Drops a whole residual branch for a row (Huang et al. 2016); put it at the end of the branch.

    A kept branch is divided by 1 - p, so that eval needs no change.

    Raises:
        ValueError: p is outside [0, 1).
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = _checked(p)

    def forward(self, x: Tensor) -> Tensor:
        """Gives the branch (N, ...), or zeros for the rows where it is dropped in training."""
        return stochastic_depth(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"p={self.p}"


class ConcreteDropout(nn.Module):
    """Dropout whose rate is learnt, through a relaxed mask (Gal, Hron and Kendall 2017, eq. 5).

    Add ``penalty`` to the loss, or the rate falls to 0.

    Raises:
        ValueError: the first rate is outside (0, 1), or the temperature is not above 0.
    """

    _NEVER_ZERO = 1e-7  # keeps the logarithms finite

    def __init__(self, p: float = 0.1, temperature: float = 0.1) -> None:
        super().__init__()
        if not 0 < p < 1 or temperature <= 0:
            raise ValueError(f"p must be between 0 and 1 and temperature above 0, got {p} and {temperature}")
        self.logit = nn.Parameter(torch.tensor(math.log(p / (1 - p))))
        self.temperature = temperature

    @property
    def p(self) -> Tensor:
        """The rate as it stands."""
        return self.logit.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Gives the input with units softly dropped in training."""
        if not self.training:
            return x
        uniform = torch.rand_like(x).clamp(self._NEVER_ZERO, 1 - self._NEVER_ZERO)
        dropped = ((self.logit + uniform.log() - (1 - uniform).log()) / self.temperature).sigmoid()
        return x * (1 - dropped) / (1 - self.p)

    def penalty(self, weight: Tensor, *, rows: int, length_scale: float = 1e-2) -> Tensor:
        """Gives the regularisation for the layer that follows, with its weight (outputs, inputs, ...) (their eq. 3-4).

        ``rows`` is the size of the training set.
        """
        p = self.p
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        return length_scale**2 * weight.square().sum() * (1 - p) / (2 * rows) - weight.shape[1] * entropy / rows
