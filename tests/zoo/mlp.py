"""Small dense networks, one way of writing a random draw each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .specimen import ROWS, Built, specimen

Change = Callable[[nn.Module, Tensor], Tensor]


class Hidden(nn.Module):
    """Linear, relu, a change of the hidden units, Linear. The change is given the module, whose flag it may read."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self, self.first(x).relu()))  # type: ignore[no-any-return]


def hidden(change: Change) -> Built:
    return Hidden(change), torch.randn(ROWS, 8)


def layered(*between: nn.Module) -> Built:
    return nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 3)), torch.randn(ROWS, 8)


# Dropout as a module.


@specimen(draws=1, note="nn.Dropout between two linear layers")
def dropout() -> Built:
    return layered(nn.ReLU(), nn.Dropout(0.3))


@specimen(draws=3, note="three nn.Dropout of different rates, the last one on the output")
def dropout_everywhere() -> Built:
    module, example = layered(nn.Dropout(0.1), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(module, nn.Dropout(0.2)), example


@specimen(draws=1, note="nn.Dropout(inplace=True)")
def dropout_inplace() -> Built:
    return layered(nn.ReLU(), nn.Dropout(0.3, inplace=True))


@specimen(draws=1, note="the network is nothing but a dropout")
def dropout_alone() -> Built:
    return nn.Dropout(0.3), torch.randn(ROWS, 8)


@specimen(draws=1, note="one dropout of rate 0, which draws nothing, and a live one")
def dropout_rate_zero() -> Built:
    return layered(nn.Dropout(0.0), nn.ReLU(), nn.Dropout(0.3))


@specimen(draws=0, note="all rates are 0", refused="no draw can ever happen")
def dropout_all_zero() -> Built:
    return layered(nn.ReLU(), nn.Dropout(0.0))


@specimen(
    draws=0, note="everything is dropped, always", refused="a rate of 1 leaves nothing to chance", mean_preserving=False
)
def dropout_rate_one() -> Built:
    return layered(nn.ReLU(), nn.Dropout(1.0))


@specimen(draws=0, note="a network without any dropout", refused="there is nothing to draw")
def no_dropout() -> Built:
    return layered(nn.ReLU())


@specimen(draws=2, note="one dropout module called twice in a forward")
def dropout_used_twice() -> Built:
    drop = nn.Dropout(0.3)
    return layered(drop, nn.ReLU(), nn.Linear(16, 16), drop)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.3)
        self.alias = self.drop

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.alias(self.first(x).relu()))  # type: ignore[no-any-return]


@specimen(draws=1, note="one dropout module under two names, called by the second")
def dropout_two_names() -> Built:
    return TwoNames(), torch.randn(ROWS, 8)


@specimen(draws=1, note="AlphaDropout keeps variance, not the expectation of a unit", mean_preserving=False)
def alpha_dropout() -> Built:
    return layered(nn.SELU(), nn.AlphaDropout(0.3))


@specimen(draws=1, note="the mean and the log-variance of a Gaussian as two halves of the output")
def gaussian_head() -> Built:
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 2)), torch.randn(ROWS, 1)


# Dropout as a function.


@specimen(draws=1, note="F.dropout(training=self.training)")
def functional_dropout() -> Built:
    return hidden(lambda net, h: F.dropout(h, 0.3, training=net.training))


@specimen(draws=1, note="torch.dropout(x, p, self.training), the function below F.dropout")
def torch_dropout() -> Built:
    return hidden(lambda net, h: torch.dropout(h, 0.3, net.training))


@specimen(draws=1, note="F.alpha_dropout(training=self.training)", mean_preserving=False)
def functional_alpha_dropout() -> Built:
    return hidden(lambda net, h: F.alpha_dropout(h, 0.3, training=net.training))


@specimen(draws=1, draws_in_eval=1, note="F.dropout without training=: live in eval as well")
def always_on() -> Built:
    return hidden(lambda net, h: F.dropout(h, 0.3))


@specimen(draws=0, note="F.dropout(training=False): the author switched it off", refused="switched off by a literal")
def literal_false() -> Built:
    return hidden(lambda net, h: F.dropout(h, 0.3, training=False))


def _inplace_unused(net: nn.Module, h: Tensor) -> Tensor:
    F.dropout(h, 0.3, training=net.training, inplace=True)
    return h


@specimen(draws=1, note="F.dropout(inplace=True) whose result nobody takes")
def inplace_unused() -> Built:
    return hidden(_inplace_unused)


def _inplace_residual(net: nn.Module, h: Tensor) -> Tensor:
    h += F.dropout(h, 0.3, net.training)
    return h


@specimen(draws=1, note="x += dropout(x): a tensor from before the draw is changed in place by it")
def inplace_residual() -> Built:
    return hidden(_inplace_residual)


def _part(net: nn.Module, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :8] = F.dropout(h[:, :8], 0.3, net.training)
    out[:, 8:] = h[:, 8:]
    return out


@specimen(draws=1, note="the dropped half of the units is written into a slice of a fresh tensor")
def slice_assignment() -> Built:
    return hidden(_part)


# Dropout on weights.


class DropConnect(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.3, self.training), self.bias)


@specimen(draws=1, note="DropConnect: F.dropout on the weight, one draw for the whole batch")
def dropconnect() -> Built:
    return nn.Sequential(DropConnect(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(ROWS, 8)


@specimen(draws=1, note="DropConnect as a parametrization of the weight")
def dropconnect_parametrized() -> Built:
    module, example = layered(nn.ReLU())
    first = module.get_submodule("0")
    parametrize.register_parametrization(first, "weight", nn.Dropout(0.3))
    return module, example


class Variational(nn.Linear):
    """Weights with a Gaussian of their own (Blundell et al. 2015, Weight Uncertainty in Neural Networks)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        weight = self.weight + 0.1 * torch.randn_like(self.weight)
        return F.linear(x, weight, self.bias + 0.1 * torch.randn(self.out_features))


@specimen(draws=2, note="Gaussian noise on weight and bias")
def variational_linear() -> Built:
    return nn.Sequential(Variational(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(ROWS, 8)
