"""The networks: one for each split, in the units of the data, with nothing in them that mcdrop would have to know."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Encoder", "Recipe", "RegressionNet"]

ACTIVATIONS: dict[str, Any] = {"relu": torch.relu, "silu": nn.functional.silu}


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained; the same for every set, but for what is chosen on held-out rows.

    ``head`` adds a log-variance beside the mean, trained by the beta-NLL of Seitzer et al. 2022 (``beta`` 0: plain
    likelihood); without it the loss is the squared error. ``bins`` > 0 adds piecewise-linear encodings of the inputs
    (Gorishniy et al. 2022). ``drop_inputs`` says whether the inputs are dropped too. ``decoupled`` weight decay is
    AdamW's with a cosine schedule; else it is an L2 penalty with a constant rate.
    """

    p: float
    hidden: tuple[int, ...]
    epochs: int
    batch: int
    rate: float
    decay: float
    activation: str = "relu"
    bins: int = 0
    head: bool = True
    beta: float = 0.0
    drop_inputs: bool = False
    decoupled: bool = True


class Encoder(nn.Module):
    """Standardised inputs, and beside them each input on a ramp from 0 to 1 within each of its quantile bins.

    The outermost ramps go on beyond the rows that were seen. Splits of one set get equally wide encodings: ``width``
    ramps, of which those that are left over are constant.
    """

    def __init__(self, x: NDArray[np.float64], bins: int, width: int | None = None) -> None:
        """Fits the encoding to training rows x (N, F)."""
        super().__init__()
        spread = x.std(axis=0)
        ramps = [ramp for column in range(x.shape[1]) for ramp in _ramps(x[:, column], column, bins)]
        self.ramps = len(ramps)
        ramps += [(0, 0.0, 1.0, 0.0, 0.0)] * ((width or 0) - len(ramps))
        column, start, length, least, most = np.array(ramps, np.float64).reshape(-1, 5).T
        self.centre, self.spread = _fixed(x.mean(axis=0)), _fixed(np.where(spread > 0, spread, 1.0))
        self.start, self.length, self.least, self.most = map(_fixed, (start, length, least, most))
        self.column = nn.Buffer(torch.tensor(column, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Encodes rows (N, F) as (N, F + ramps)."""
        standard = (x - self.centre) / self.spread
        if not len(self.column):
            return standard
        ramps = torch.minimum(torch.maximum((x[:, self.column] - self.start) / self.length, self.least), self.most)
        return torch.cat([standard, ramps], dim=1)


def _fixed(values: NDArray[np.float64]) -> nn.Buffer:
    return nn.Buffer(torch.tensor(values, dtype=torch.float32))


def _ramps(values: NDArray[np.float64], column: int, bins: int) -> list[tuple[float, ...]]:
    """Column, start, length and bounds of each ramp; a column of fewer than three quantiles needs none."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1))) if bins else np.empty(0)
    last = len(edges) - 2
    return [
        (column, edges[i], edges[i + 1] - edges[i], 0.0 if i else -np.inf, np.inf if i == last else 1.0)
        for i in range(last + 1 if last > 0 else 0)
    ]


class RegressionNet(nn.Module):
    """Raw inputs (N, F) to the mean of y (N, 1), or with a head to mean and log-variance (N, 2), in the units of y."""

    def __init__(
        self, recipe: Recipe, encoder: Encoder, weights: list[tuple[Tensor, Tensor]], y: NDArray[np.float64]
    ) -> None:
        """Takes the layers' weights (in, out) and biases, and the training targets y (N,) that set the scale."""
        super().__init__()
        self.encoder, self.activation = encoder, ACTIVATIONS[recipe.activation]
        self.drops = nn.ModuleList(
            nn.Dropout(recipe.p) if i or recipe.drop_inputs else nn.Identity() for i in range(len(weights))
        )
        self.linears = nn.ModuleList(_linear(*layer) for layer in weights)
        self.centre, self.spread = float(y.mean()), float(y.std())
        self.heads = recipe.head
        self.noise_scale = 1.0  # multiplies the noise variance of the head

    def forward(self, x: Tensor) -> Tensor:
        """Gives the outputs of one pass."""
        h = self.encoder(x)
        for i, (drop, linear) in enumerate(zip(self.drops, self.linears, strict=True)):
            h = linear(drop(self.activation(h) if i else h))
        mean: Tensor = h[:, :1] * self.spread + self.centre
        if not self.heads:
            return mean
        shift = 2 * float(np.log(self.spread)) + float(np.log(self.noise_scale))
        return torch.cat([mean, h[:, 1:] + shift], dim=1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    layer.weight.data.copy_(weight.T)
    layer.bias.data.copy_(bias.reshape(-1))
    return layer
