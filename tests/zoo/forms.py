"""Ordinary dropout in unusual surroundings: inputs, outputs, number formats, code that resists vectorising."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .awkward import TwoLayers, rows
from .mlp import hidden
from .specimen import Built, specimen

# Outputs.


class TwoHeads(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"mean": y, "scale": y.exp()}


class Pair(NamedTuple):
    values: Tensor
    norms: Tensor


class Named(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return Pair(y, y.norm(dim=-1))


class Tupled(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, [y.sum(-1), None]


class Scalar(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:, 0]


@specimen(draws=1, note="a dict of two outputs", output="mean")
def dict_output() -> Built:
    return TwoHeads(), rows()


@specimen(draws=1, note="a tuple with a list and None inside", output=lambda result: result[0])
def tuple_output() -> Built:
    return Tupled(), rows()


@specimen(draws=1, note="a named tuple", output=lambda result: result.values)
def named_tuple_output() -> Built:
    return Named(), rows()


@specimen(draws=1, note="one number for each row: an output of shape (N,)")
def flat_output() -> Built:
    return Scalar(), rows()


# Inputs.


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.drop = nn.Linear(8, 3), nn.Linear(4, 3), nn.Dropout(0.3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.drop(self.left(left)) + self.right(right)  # type: ignore[no-any-return]


@specimen(draws=1, note="two positional inputs; the draw is on one of them")
def two_inputs() -> Built:
    return Sum(), (rows(8), rows(4))


@specimen(draws=1, note="two inputs by keyword")
def keyword_inputs() -> Built:
    return Sum(), {"right": rows(4), "left": rows(8)}


# Number formats.


@specimen(draws=1, note="float16")
def half() -> Built:
    return TwoLayers().half(), rows().half()


@specimen(draws=1, note="bfloat16")
def bfloat() -> Built:
    return TwoLayers().bfloat16(), rows().bfloat16()


@specimen(draws=1, note="float64")
def double() -> Built:
    return TwoLayers().double(), rows().double()


class Autocast(TwoLayers):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return y.float()


@specimen(draws=1, note="autocast to bfloat16 inside the forward")
def autocast() -> Built:
    return Autocast(), rows()


# Code that a vectorising engine may stumble over.


def _numpy_inside(net: nn.Module, h: Tensor) -> Tensor:
    return torch.from_numpy(F.dropout(h, 0.3, net.training).detach().numpy().copy())


@specimen(draws=1, note="the dropped units go through numpy")
def numpy_inside() -> Built:
    return hidden(_numpy_inside)


def _dynamic_shape(net: nn.Module, h: Tensor) -> Tensor:
    h = F.dropout(h, 0.3, net.training)
    out = torch.zeros_like(h)
    out[h > 0.2] = h[h > 0.2]
    return out


@specimen(draws=1, note="boolean indexing by dropped values: shapes depend on the mask")
def dynamic_shape() -> Built:
    return hidden(_dynamic_shape)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


@specimen(draws=1, note="a custom autograd.Function of the old style, without a rule for vmap")
def custom_autograd() -> Built:
    apply: Any = Double.apply
    return hidden(lambda net, h: apply(F.dropout(h, 0.3, net.training)))


class Remembers(TwoLayers):
    """Keeps its last activation, as networks under inspection do."""

    def forward(self, x: Tensor) -> Any:
        self.activation = self.drop(self.first(x).relu())
        return self.last(self.activation)


@specimen(draws=1, note="an activation is kept on self")
def remembers_activation() -> Built:
    return Remembers(), rows()


class Slope(nn.Module):
    """Gives an energy and its slope along the inputs, as force fields do: a gradient is taken inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            energy = self.last(self.drop(self.first(place).tanh()))
            (slope,) = torch.autograd.grad(energy.sum(), place)
        return torch.cat([energy, slope], -1).detach()


@specimen(draws=1, note="a gradient is taken inside the forward, through the dropout")
def gradient_inside() -> Built:
    return Slope(), rows()


class Inference(TwoLayers):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


@specimen(draws=1, note="forward is decorated with torch.inference_mode")
def inference_mode_inside() -> Built:
    return Inference(), rows()
