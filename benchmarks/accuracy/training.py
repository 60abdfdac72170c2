"""Training the networks of all splits at once: every layer is one batched matrix product over the splits."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.accuracy.nets import ACTIVATIONS, Encoder, Recipe, RegressionNet

__all__ = ["train"]

Array = NDArray[np.float64]
Layer = tuple[Tensor, Tensor]  # weights (S, in, out), biases (S, 1, out)

_WARM_UP = 0.02  # share of the steps over which the rate rises


def train(recipe: Recipe, xs: Sequence[Array], ys: Sequence[Array], seed: int) -> list[RegressionNet]:
    """Trains one network for each split, on equally many rows x (N, F) and y (N,); gives them in eval mode."""
    width = max(Encoder(x, recipe.bins).ramps for x in xs)
    encoders = [Encoder(x, recipe.bins, width) for x in xs]
    x = torch.stack([encoder(_float(rows)) for encoder, rows in zip(encoders, xs, strict=True)])
    y = torch.stack([_float((values - values.mean()) / values.std()) for values in ys])
    torch.manual_seed(seed)
    layers = _layers(len(xs), (x.shape[-1], *recipe.hidden, 2 if recipe.head else 1))
    _descend(recipe, layers, x, y)
    return [
        RegressionNet(recipe, encoder, [(w[k].detach(), b[k].detach()) for w, b in layers], ys[k]).eval()
        for k, encoder in enumerate(encoders)
    ]


def _float(values: Array) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _layers(splits: int, widths: tuple[int, ...]) -> list[Layer]:
    """Glorot's uniform weights and zero biases, as in Keras."""
    layers = []
    for inputs, outputs in pairwise(widths):
        bound = math.sqrt(6 / (inputs + outputs))
        weights = torch.empty(splits, inputs, outputs).uniform_(-bound, bound)
        layers.append((weights.requires_grad_(), torch.zeros(splits, 1, outputs, requires_grad=True)))
    return layers


def _descend(recipe: Recipe, layers: list[Layer], x: Tensor, y: Tensor) -> None:
    splits, count = y.shape
    optimiser = (torch.optim.AdamW if recipe.decoupled else torch.optim.Adam)(
        [
            {"params": [weights for weights, _ in layers], "weight_decay": recipe.decay},
            {"params": [bias for _, bias in layers], "weight_decay": 0.0},
        ],
        lr=recipe.rate,
        fused=True,
    )
    steps, step = recipe.epochs * math.ceil(count / recipe.batch), 0
    for _ in range(recipe.epochs):
        order = torch.rand(splits, count).argsort(dim=1)
        for rows in order.split(recipe.batch, dim=1):
            step += 1
            for group in optimiser.param_groups if recipe.decoupled else ():
                group["lr"] = recipe.rate * _schedule(step / steps)
            split = torch.arange(splits)[:, None]
            loss = _loss(recipe, _forward(recipe, layers, x[split, rows]), y[split, rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _schedule(progress: float) -> float:
    """A short linear rise, and half a cosine down to zero."""
    return min(1.0, progress / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def _forward(recipe: Recipe, layers: list[Layer], h: Tensor) -> Tensor:
    """Rows (S, B, F) to outputs (S, B, 1 or 2), with a mask for each row."""
    if recipe.drop_inputs:
        h = _dropped(h, recipe.p)
    for i, (weights, bias) in enumerate(layers):
        if i:
            h = _dropped(ACTIVATIONS[recipe.activation](h), recipe.p)
        h = torch.baddbmm(bias, h, weights)
    return h


def _dropped(h: Tensor, p: float) -> Tensor:
    """Dropout from 16 random bits an entry: four entries a draw, several times faster than torch's own on a CPU."""
    draws = torch.empty(-(-h.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drop = round(p * 2**16)
    keep = draws.view(torch.int16)[: h.numel()].view(h.shape) >= drop - 2**15
    return h * keep * (1 / (1 - drop / 2**16))


def _loss(recipe: Recipe, outputs: Tensor, y: Tensor) -> Tensor:
    """Sum over the splits of the mean over the batch."""
    error = (outputs[..., 0] - y) ** 2
    if recipe.head:
        noise = outputs[..., 1]
        error = 0.5 * (error * torch.exp(-noise) + noise) * torch.exp(recipe.beta * noise.detach())
    return error.mean(dim=1).sum()
