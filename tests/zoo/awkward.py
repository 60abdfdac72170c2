"""Networks whose training flag does more than draw, and draws that do not come from torch."""

import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .handmade import gated
from .mlp import Hidden, hidden, layered
from .reference import restored
from .specimen import ROWS, Built, specimen


def rows(width: int = 8) -> Tensor:
    return torch.randn(ROWS, width)


class TwoLayers(nn.Module):
    """Two linear layers and a dropout, for subclasses to put together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.drop(self.first(x).relu()))


# The flag also moves state.


class MovingAverage(TwoLayers):
    """Keeps a moving average of its hidden units while training, by the flag that drops."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).relu()
        if self.training:
            self.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.last(F.dropout(h, 0.3, self.training))


@specimen(draws=1, note="one flag moves a buffer and drops", around=restored)
def moving_average() -> Built:
    return MovingAverage(), rows()


class Counter(TwoLayers):
    """Counts its training steps in a plain attribute and cools down with them."""

    steps = 0

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.steps += 1
        return super().forward(x) * (1 + 1 / (1 + self.steps))


@specimen(draws=1, note="the root's flag counts steps in a plain attribute", live=("drop",))
def step_counter() -> Built:
    return Counter(), rows()


@specimen(draws=1, note="spectral norm takes a power iteration while training", live=("2",))
def spectral_norm() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    parametrizations.spectral_norm(module.get_submodule("0"))
    return module, example


@specimen(
    draws=1,
    note="an observer moves its range in eval too",
    live=("2",),
    row_coupled=True,
    around=restored,
)
def fake_quantised() -> Built:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    observer: nn.Module = FakeQuantize(MovingAverageMinMaxObserver)
    module, example = layered(nn.ReLU(), nn.Dropout(0.3), observer)
    module.eval()(example)  # the first rows set the range, later ones move it
    return module, example


# The flag also changes the output.


class ReturnsLoss(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"loss": y.square().mean()} if self.training else y


@specimen(draws=1, note="the root's flag turns the output into a loss", live=("drop",))
def returns_loss() -> Built:
    return ReturnsLoss(), rows()


class Auxiliary(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, self.last(x.repeat(1, 2))) if self.training else y


@specimen(draws=1, note="the root's flag adds an auxiliary output", live=("drop",))
def auxiliary_head() -> Built:
    return Auxiliary(), rows()


class WantsTargets(TwoLayers):
    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        if self.training and target is None:
            raise ValueError("targets are needed in training")
        return super().forward(x)


@specimen(draws=1, note="the root raises in training, as detection networks do without targets", live=("drop",))
def wants_targets() -> Built:
    return WantsTargets(), rows()


class Rescales(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return 2 * y if self.training else y


@specimen(draws=1, note="the root's flag doubles the output: a change without a draw", live=("drop",))
def rescales() -> Built:
    return Rescales(), rows()


class ForbidsTrain(TwoLayers):
    """A network in production that nobody may put into training mode."""

    def train(self, mode: bool = True) -> "ForbidsTrain":
        if mode:
            raise RuntimeError("this network is not to be trained")
        return super().train(mode)


@specimen(draws=1, note="train() raises; flags can still be set one by one")
def forbids_train() -> Built:
    return ForbidsTrain(), rows()


# The flag decides which code runs.


class Checkpointed(Hidden):
    """Gradient checkpointing while training, a plain call in eval."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)
        return self.last(h)  # type: ignore[no-any-return]

    def block(self, x: Tensor) -> Tensor:
        return self.change(self, self.first(x).relu())


@specimen(draws=1, note="gradient checkpointing while training")
def checkpointed() -> Built:
    return Checkpointed(lambda net, h: F.dropout(h, 0.3, net.training)), rows()


class LayerDrop(nn.Module):
    """Skips whole layers by a Python branch on a drawn number (Fan et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 0.3):
                x = x + layer(x).relu()
        return self.head(x)  # type: ignore[no-any-return]


@specimen(draws=4, note="a Python branch on torch.rand([]) skips layers for the whole batch")
def layer_drop() -> Built:
    return LayerDrop(), rows()


def _item_rate(h: Tensor) -> Tensor:
    rate = float(torch.rand(1).item()) * 0.5
    return F.dropout(h, rate, training=True)


@specimen(draws=2, note="the rate itself is drawn, and read with .item()")
def drawn_rate() -> Built:
    return gated(_item_rate)


@specimen(draws=1, note="a mask from a generator of the network's own")
def own_generator() -> Built:
    source = torch.Generator().manual_seed(5)
    return gated(lambda h: h * torch.bernoulli(torch.full_like(h, 0.7), generator=source) / 0.7)


# Draws that torch does not know of.


@specimen(draws=0, foreign=True, note="a mask by numpy's global generator", refused="numpy draws outside of torch")
def numpy_mask() -> Built:
    return gated(lambda h: h * torch.from_numpy(np.random.binomial(1, 0.7, h.shape)).float() / 0.7)  # noqa: NPY002


@specimen(draws=0, foreign=True, note="layers are skipped by Python's random", refused="Python draws outside of torch")
def python_random() -> Built:
    return gated(lambda h: h * 0.5 if random.random() < 0.3 else h)


class OwnSwitch(TwoLayers):
    """Draws when an attribute of its own says so; the training flag means nothing to it."""

    sampling = False

    def forward(self, x: Tensor) -> Any:
        return self.last(F.dropout(self.first(x).relu(), 0.3, self.sampling))


class _Sampling:
    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __enter__(self) -> None:
        self.module.sampling = True

    def __exit__(self, *_: object) -> None:
        self.module.sampling = False


@specimen(draws=1, note="a switch of its own", around=_Sampling, refused="no training flag makes it draw")
def own_switch() -> Built:
    return OwnSwitch(), rows()


@specimen(draws=1, note="TorchScript: the Python is gone", refused="a scripted network's draws cannot be replaced")
def torchscript() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: nn.Module = torch.jit.script(module)
    return scripted, example


@specimen(draws=2, note="a drawn value that reaches nothing, and a live dropout", idle=1)
def discarded_draw() -> Built:
    def between(net: nn.Module, h: Tensor) -> Tensor:
        F.dropout(h, 0.5, net.training)
        return F.dropout(h, 0.3, net.training)

    return hidden(between)
