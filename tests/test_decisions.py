"""Passes that decide by values run together as far as they decide alike, and answer as one by one."""

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from captures import apart, backend_of, loop, passes
from devices import on_each_device
from torch import Tensor, nn

import mcdrop
from mcdrop.decisions import DECISION_RULES, Parted, deciding
from mcdrop.errors import InputError
from mcdrop.stacks import Span
from mcdrop.tiers import TIERS

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Exits(nn.Module):
    """Leaves after the layer at which a mask makes a value pass a limit: a way for each number of layers."""

    def __init__(self, layers: int = 6, limit: float = 2.0) -> None:
        super().__init__()
        self.limit = limit
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.drop = nn.Dropout(0.5)
        self.left: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.drop(x.new_ones(len(x), len(self.layers), 4))  # all in every pass
        for number, layer in enumerate(self.layers):
            x = x + kept[:, number] * layer(x).tanh()
            if x[0, 0].abs() > self.limit:
                break
        self.left[number] += 1
        return x * (number + 1)


class Sound(nn.Module):
    """Asserts, as many networks do, that its values are numbers."""

    runs: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.runs["forward"] += 1
        y: Tensor = self.drop(self.layer(x))
        assert not torch.isnan(y).any()
        if not torch.isfinite(y).all().item():
            raise ValueError("an overflow")
        return y


class Counted(nn.Module):
    """Takes as many steps as units are kept, each of which doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.ones_like(x))
        for _ in range(int((h[0] > 0).sum())):
            x = x * 2
        y: Tensor = self.last(x + 0 * h)
        return y


def made(network: nn.Module, device: str) -> mcdrop.Model:
    model = mcdrop.wrap(network.to(device), example=X)
    assert model.audit.tier == "vmap", model.audit.tier_reason
    return model


@pytest.mark.parametrize("make", [Exits, Counted, lambda: Exits(40, 8.0)], ids=["exits", "steps", "many ways"])
@on_each_device
def test_they_are_the_passes_of_the_loop(make: Callable[[], nn.Module], device: str) -> None:
    torch.manual_seed(0)
    model = made(make(), device)
    for count in (2, 3, 17, 200):
        for rows in (X, 2 * X, X[:1]):
            assert apart(passes(model, rows, count), loop(model, rows, count)) < 1e-5


def test_they_take_several_ways() -> None:
    """Else the test above compares nothing."""
    torch.manual_seed(0)
    net = Exits().train()
    for _ in range(200):
        net(X)
    assert sorted(net.left.values())[-3] > 10


@on_each_device
def test_assertions_that_hold_cost_no_further_run(device: str) -> None:
    torch.manual_seed(0)
    model = made(Sound(), device)
    Sound.runs.clear()
    passes(model, X, 100)
    assert Sound.runs["forward"] <= 2  # of all passes, and of those with all draws off


def test_an_assertion_that_fails_is_the_networks_own() -> None:
    torch.manual_seed(0)
    model = made(Sound(), "cpu")
    with torch.no_grad():
        next(model.module.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match=r"the network cannot take inputs of shape 0: .*: assert") as caught:
        passes(model, X, 10)
    assert isinstance(caught.value.__cause__, AssertionError)


def together(model: mcdrop.Model, stacks: list[Any]) -> None:
    backend = backend_of(model)
    plan, rows = backend.plans.prepare(model.rows(X))
    TIERS["vmap"](backend.live, rows, backend.pick, plan.trace, stacks)


def test_passes_of_which_each_has_a_number_of_its_own_are_not_tried_together() -> None:
    class Own(Sound):
        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.drop(self.layer(x)[:, None] * torch.arange(20.0)[:, None])
            return h.sum(1) * 2 if float(h.sum()) > 1e9 else h.sum(1)

    torch.manual_seed(0)
    model = mcdrop.wrap(Own(), example=X)
    assert model.audit.tier == "direct"
    backend = backend_of(model)
    stacks = backend.plans.stacks(backend.plan(model.rows(X)), Span(9, 0, 0, "iid"))
    with torch.no_grad(), pytest.raises(Parted, match="hardly two passes decide alike"):
        together(model, stacks)


NUMBERS = {
    Tensor.__bool__: True,
    Tensor.__float__: 1.0,
    Tensor.__index__: 1,
    Tensor.__int__: 1,
    Tensor.is_nonzero: True,
    Tensor.item: 1,
    torch.is_nonzero: True,
}


@pytest.mark.parametrize("function", DECISION_RULES, ids=lambda function: function.__qualname__)
def test_a_run_goes_the_way_of_most_of_its_passes(function: Callable[..., Any]) -> None:
    rule, found = DECISION_RULES[function], list[Any]()

    def read(one: Tensor) -> Tensor:
        found.append(rule(None, one))
        return one

    with deciding(3) as stays:
        torch.vmap(read)(torch.tensor([1, 1, 1]))
        assert stays == [True, True, True]
        torch.vmap(read)(torch.tensor([0, 1, 1]))
        assert stays == [False, True, True]
        torch.vmap(read)(torch.tensor([1, 0, 1]))  # the first one is out already
        assert sum(stays) == 1
    assert found[:2] == [NUMBERS[function]] * 2
    assert type(found[0]) is type(NUMBERS[function])
    assert rule(None, torch.tensor(1)) == 1  # of no pass in particular
    with pytest.raises(RuntimeError):  # as ever where nobody asked for more
        torch.vmap(read)(torch.tensor([0, 1, 1]))


class Asking(nn.Module):
    """Asks of what it has dropped; what it does in the rarer case, few of the example's passes show."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.layer, self.drop, self.limit = nn.Linear(4, 16), nn.Dropout(0.5), limit
        self.depth = 0

    def forward(self, x: Tensor) -> Tensor:
        self.depth += 1
        h: Tensor = self.drop(self.layer(x).relu() + 1)
        y = self.answer(h, h.mean())
        self.depth -= 1
        return y.sum(1, keepdim=True)

    def answer(self, h: Tensor, asked: Tensor) -> Tensor:
        return h * (3 if asked > self.limit else 1) * (1 + self.depth)


class Catching(Asking):
    def answer(self, h: Tensor, asked: Tensor) -> Tensor:
        try:
            return h * 3 if asked > self.limit else h
        except Exception:
            return h * 0


class Failing(Asking):
    def answer(self, h: Tensor, asked: Tensor) -> Tensor:
        return h * len(h.flatten().nonzero()) if asked > self.limit else h


class Writing(Asking):
    def answer(self, h: Tensor, asked: Tensor) -> Tensor:
        before = asked.item()
        if asked > self.limit:
            asked.mul_(10)
        return h * before


class Telling(Asking):
    def answer(self, h: Tensor, asked: Tensor) -> Tensor:
        return h * (3 if isinstance(asked.item(), float) else 1)


@pytest.mark.parametrize("network", [Asking, Catching, Failing, Writing, Telling])
@pytest.mark.parametrize("limit", [1.2, 1.5, 1.8])
def test_a_network_sees_nothing_of_it(network: type[Asking], limit: float) -> None:
    torch.manual_seed(0)
    model = mcdrop.wrap(network(limit), example=X)
    shadow: Any = backend_of(model).live
    expected = loop(model, X, 200).numpy()
    for _ in range(3):
        np.testing.assert_allclose(passes(model, X, 200), expected, rtol=1e-5, atol=1e-6)
        assert shadow.depth == 0
