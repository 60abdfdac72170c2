"""Ordinary dropout in unusual surroundings: outputs, number formats, wrappers, hooks, modules that are hard to see."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .awkward import TwoLayers, rows
from .mlp import hidden, layered
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


def _branch_on_value(net: nn.Module, h: Tensor) -> Tensor:
    h = F.dropout(h, 0.3, net.training)
    return h if h.sum().item() > 0 else -h


@specimen(draws=1, note="a Python branch on a dropped value, over all rows", row_coupled=True)
def branch_on_value() -> Built:
    return hidden(_branch_on_value)


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


# Modules that are hard to see.


class InContainer(TwoLayers):
    """Calls its layers through a dict and a bound method, which a copy of the tree must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, Any] = {"first": self.first, "rest": [self.drop, self.last]}
        self.activate = self.dropped_relu

    def dropped_relu(self, x: Tensor) -> Tensor:
        return F.dropout(x.relu(), 0.2, self.training)

    def forward(self, x: Tensor) -> Any:
        drop, last = self.steps["rest"]
        return last(drop(self.activate(self.steps["first"](x))))


@specimen(draws=2, note="layers called through a dict, a list and a bound method")
def called_through_container() -> Built:
    return InContainer(), rows()


class Unregistered(nn.Module):
    """Holds a dropout in a plain list and nowhere else: eval() does not reach it, so it is always live."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.drops = [nn.Dropout(0.3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drops[0](self.first(x).relu()))  # type: ignore[no-any-return]


@specimen(draws=1, draws_in_eval=1, note="a dropout in a plain list, which eval() cannot reach")
def unregistered_dropout() -> Built:
    return Unregistered(), rows()


@specimen(draws=1, note="a forward hook that drops by the flag of the module it is given")
def hook() -> Built:
    module, example = layered(nn.ReLU())
    module.get_submodule("1").register_forward_hook(lambda m, _, out: F.dropout(out, 0.3, m.training))
    return module, example


@specimen(
    draws=1,
    note="a forward hook that drops by the flag of a module it has closed over",
    refused="the flag that it reads cannot be set without touching the network",
)
def closure_hook() -> Built:
    module, example = layered(nn.ReLU())
    module.get_submodule("1").register_forward_hook(lambda _, __, out: F.dropout(out, 0.3, module.training))
    return module, example


# Wrappers of torch.


@specimen(draws=1, note="nn.DataParallel without a GPU")
def data_parallel() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    return nn.DataParallel(module), example


@specimen(draws=1, note="torch.compile, by a backend that runs the graph as it is")
def compiled() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    wrapped: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped, example
