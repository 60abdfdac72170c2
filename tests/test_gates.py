"""Training flags that are read, or draw, only where others are on; and flags behind the class of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import UncontrolledDraw

PASSES = 4000
X = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


class Drop(nn.Module):
    """Dropout whose call reads the flag, as many write it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Gated(nn.Module):
    """Drops a tenth, and then by a way that a test names."""

    def __init__(self, way: "Callable[[Gated, Tensor], Tensor]", second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.way = nn.Dropout(0.1), second, nn.BatchNorm1d(2, eps=0.0), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, self.first(x))


def _by_class(net: Gated, x: Tensor) -> Tensor:
    dropped: Tensor = net.second(x) if type(net.second) is nn.Dropout else x
    return dropped


def _in_eval_for_a_while(net: Gated, x: Tensor) -> Tensor:
    was = net.training
    net.eval()
    kept = net.second(x)
    net.train(was)
    net.norm.eval()
    dropped: Tensor = net.second(kept)
    return dropped


WAYS: dict[str, Callable[[Gated, Tensor], Tensor]] = {
    "a layer in a branch": lambda net, x: net.second(x) if net.training else x,
    "both flags at once": lambda net, x: F.dropout(x, 0.5, net.training and net.second.training),
    "both flags, the layer's first": lambda net, x: F.dropout(x, 0.5, net.second.training and net.training),
    "all flags, each of them read": lambda net, x: F.dropout(x, 0.5, all([net.training, net.second.training])),
    "a branch of eval": lambda net, x: x if not net.training else net.second(x),
    "beside a norm layer": lambda net, x: net.norm(net.second(x) if net.training else x),
    "by the class of a layer": _by_class,
    "in eval for a while": _in_eval_for_a_while,
}


def _variances(net: nn.Module, output: str | None = None) -> np.ndarray:
    """Of independent passes, over what the drop rates 0.1 and 0.5 promise: of x m / q, x^2 (1 / q - 1)."""
    model = mcdrop.wrap(net.eval(), example=X, output=output)
    assert len(model.audit.live) == 2
    found = mcdrop.sample(model, X, mcdrop.PassPlan(PASSES, 0, "iid")).variance
    return found / (X.double().numpy() ** 2 * (1 / (0.9 * 0.5) - 1))


def _tolerance() -> float:
    """Five standard errors of the variance of what is 1 / q with the probability q, else 0, relative to itself."""
    q = 0.9 * 0.5
    variance = 1 / q - 1
    fourth = q * (1 / q - 1) ** 4 + (1 - q)
    return float(5 * np.sqrt((fourth - variance**2) / PASSES) / variance)


@pytest.mark.parametrize("second", [nn.Dropout(0.5), Drop()], ids=["torch's layer", "a layer of its own"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_draw_behind_two_flags_is_live(way: Callable[[Gated, Tensor], Tensor], second: nn.Module) -> None:
    if way is _by_class and not isinstance(second, nn.Dropout):
        pytest.skip("its branch is for torch's layer")
    np.testing.assert_allclose(_variances(Gated(way, second)), 1.0, rtol=_tolerance())


class Nested(nn.Module):
    """A gate within a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated(WAYS["a layer in a branch"], nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.training else x


def test_a_gate_within_a_gate_is_passed() -> None:
    np.testing.assert_allclose(_variances(Nested()), 1.0, rtol=_tolerance())


@dataclass
class Answer:
    """What some networks return, which torch knows nothing of."""

    y: Tensor


def test_a_record_that_torch_does_not_know_is_looked_into() -> None:
    net = Gated(lambda net, x: Answer(net.second(x) if net.training else x), nn.Dropout(0.5))  # type: ignore[arg-type,return-value]
    np.testing.assert_allclose(_variances(net, output="y"), 1.0, rtol=_tolerance())


def test_draws_of_a_way_that_computes_something_else_are_named() -> None:
    net = Gated(lambda net, x: net.second(x) * 1.5 if net.training else x, nn.Dropout(0.5)).eval()
    with pytest.raises(UncontrolledDraw, match="1 draws in the root module, which computes something else in training"):
        mcdrop.wrap(net, example=X)


class Auxiliary(nn.Module):
    """Has a further head in training, as Inception has; nothing of it reaches the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y: Tensor = self.drop(x)
        return (y, self.head(x)) if self.training else y


def test_draws_of_an_auxiliary_head_are_no_loss() -> None:
    model = mcdrop.wrap(Auxiliary().eval(), example=X)
    assert [(site.path, site.p) for site in model.audit.live] == [("drop", 0.5)]


def test_the_network_is_left_as_it_was() -> None:
    net = Gated(WAYS["a layer in a branch"], nn.Dropout(0.5)).eval()
    names = [name for name, _ in net.named_modules()]
    before = [dict(vars(child)) for child in net.modules()]
    mcdrop.wrap(net, example=X)
    assert [name for name, _ in net.named_modules()] == names
    assert [vars(child) for child in net.modules()] == before
    assert [type(child._modules) for child in net.modules()] == [dict] * len(before)
