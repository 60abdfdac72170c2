"""Training flags that are read, or draw, only where others are on; and flags behind the class of a layer."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        self.first, self.second, self.norm, self.way = nn.Dropout(0.1), second, nn.BatchNorm1d(2), way
        self.gate = nn.Dropout(0.1)

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


def _drawn_in_eval_too(net: Gated, x: Tensor) -> Tensor:
    kept = torch.rand(x.shape) >= 0.5
    return x * kept * 2 if net.training else x


def _by_a_copy(net: Gated, x: Tensor) -> Tensor:
    dropped: Tensor = copy.deepcopy(net.second)(x)
    return dropped


def _by_setting_a_rate(net: Gated, x: Tensor) -> Tensor:
    net.gate.p = 0.5 if net.training else 0.0
    dropped: Tensor = net.gate(x)
    return dropped


WAYS: dict[str, Callable[[Gated, Tensor], Tensor]] = {
    "a layer in a branch": lambda net, x: net.second(x) if net.training else x,
    "both flags at once": lambda net, x: F.dropout(x, 0.5, net.training and net.second.training),
    "both flags, the layer's first": lambda net, x: F.dropout(x, 0.5, net.second.training and net.training),
    "all flags, each of them read": lambda net, x: F.dropout(x, 0.5, all([net.training, net.second.training])),
    "a branch of eval": lambda net, x: x if not net.training else net.second(x),
    "beside a norm layer": lambda net, x: net.norm(net.second(x) if net.training else x),
    "by the class of a layer": _by_class,
    "by a copy of a layer": _by_a_copy,
    "one of two flags": lambda net, x: net.second(x) if net.training or net.norm.training or net.gate.training else x,
    "a rate by another flag": lambda net, x: F.dropout(x, 0.5 if net.training else 0.1, net.second.training),
    "a rate that the flag sets": _by_setting_a_rate,
    "other layers in eval": lambda net, x: net.second(x) if net.training else net.gate(x),
    "chosen by a tensor": lambda net, x: torch.where(torch.tensor(net.training), net.second(x), x),
    "by the dict of a module": lambda net, x: net.second(x) if vars(net)["training"] else x,
    "by a key of that dict": lambda net, x: net.second(x) if net.__dict__.get("training") else x,
    "drawn in eval too": _drawn_in_eval_too,
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


def _two_outputs(net: Gated, x: Tensor) -> Any:
    return (net.second(x) if net.gate.training else x, x.sum()) if net.training else x


def _by_inner_flags(net: Gated, x: Tensor) -> Tensor:
    inner = net.gate.training
    return (net.second(x) if inner else x) * 1.1 if net.training else x


def _then_fails(net: Gated, x: Tensor) -> Tensor:
    if net.training:
        net.second(x)
        raise ValueError("targets are needed")
    return x


def _both_at_once(net: Gated, x: Tensor) -> Any:
    outer, inner = net.training, net.gate.training
    return (net.second(x) * 2, x.sum()) if outer and inner else x


LOST: dict[str, tuple[Callable[[Gated, Tensor], Any], str]] = {
    "another scale": (lambda net, x: net.second(x) * 1.5 if net.training else x, "computes something else in training"),
    "by inner flags": (_by_inner_flags, "computes something else in training mode"),
    "two flags at once": (_both_at_once, "computes something else in training mode together with others"),
    "a second output": (_two_outputs, "returns something else in training mode"),
}


@pytest.mark.parametrize(("way", "said"), LOST.values(), ids=LOST)
@pytest.mark.parametrize("rate", [0.5, 0.001])
def test_draws_of_a_way_that_only_training_takes_are_named(way: Any, said: str, rate: float) -> None:
    net = Gated(way, nn.Dropout(rate)).eval()
    with pytest.raises(UncontrolledDraw, match=f"1 draws in the root module, which {said}"):
        mcdrop.wrap(net, example=X, output=lambda found: found[0] if isinstance(found, tuple) else found)


def test_draws_before_a_failure_of_training_are_told() -> None:
    model = mcdrop.wrap(Gated(_then_fails, nn.Dropout(0.5)).eval(), example=X)
    assert [site.path for site in model.audit.live] == ["first"]
    assert model.audit.kept[""].endswith("ValueError: targets are needed; 1 draws before that stay off")


@pytest.mark.parametrize("first", [False, True])
def test_draws_that_only_a_loss_of_training_follows_change_nothing(first: bool) -> None:
    """Whether it is kept or returned, before the output or after it."""

    def returned(net: Gated, x: Tensor) -> Any:
        aside = net.second(x) * 2
        return ((aside, x) if first else (x, aside)) if net.training else x

    def kept(net: Any, x: Tensor) -> Tensor:
        if net.training:
            net.loss = net.second(x).square().sum()
            float(net.loss)
        return x

    for way in (returned, kept):
        model = mcdrop.wrap(Gated(way, nn.Dropout(0.5)).eval(), example=X)
        assert [site.path for site in model.audit.live] == ["first"]
        assert model.audit.tier == "captured"


def test_a_draw_that_differs_between_the_lanes_of_a_vmap_is_named() -> None:
    def way(net: Gated, x: Tensor) -> Tensor:
        found: Tensor = torch.vmap(net.second, in_dims=1, out_dims=1, randomness="different")(x)
        return found

    with pytest.raises(UncontrolledDraw, match=r"a draw in torch.vmap with randomness='different'"):
        mcdrop.wrap(Gated(way, nn.Dropout(0.5)).eval(), example=X)


def _sets(net: Any) -> None:
    net.shift = 5.0


def _grows(net: Any) -> None:
    net.log.append(5.0)


def _adds(net: Any) -> None:
    net.added = nn.Threshold(100.0, 5.0)


@pytest.mark.parametrize("leave", [_sets, _grows, _adds])
@pytest.mark.parametrize("fails", [False, True])
def test_what_training_leaves_on_a_network_is_not_there_in_passes(leave: Callable[[Any], None], fails: bool) -> None:
    def way(net: Any, x: Tensor) -> Any:
        if net.training:
            leave(net)
            if fails:
                raise ValueError("targets are needed")
        x = x + getattr(net, "shift", 0.0) + sum(net.log)
        return net.added(x) if hasattr(net, "added") else x

    net: Any = Gated(way, nn.Dropout(0.5)).eval()
    net.log = []
    model = mcdrop.wrap(net, example=X)
    mean = mcdrop.sample(model, X, mcdrop.PassPlan(PASSES, 0, "iid")).mean
    np.testing.assert_allclose(mean, X, atol=5 * float(X.abs().max()) * np.sqrt(0.1 / 0.9 / PASSES))
    assert net.log == []
    assert not hasattr(net, "added")


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
