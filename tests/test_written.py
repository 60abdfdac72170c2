"""What forwards set on a network or register with it: parameters under a weight's name, hooks, and what is apart."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import ModelRefused

PASSES = 2_000
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def agrees(net: nn.Module) -> mcdrop.Model:
    """Checks that passes have mean and variance of the network's own calls, within 5 standard errors."""
    model = mcdrop.wrap(net, example=X)
    got = mcdrop.predict(model, X, passes=PASSES, sampler="iid")
    with torch.no_grad():
        own = torch.stack([net(X) for _ in range(PASSES)]).numpy().astype(float)
    variance = own.var(0, ddof=1)
    assert (np.abs(got.mean - own.mean(0)) < 5 * np.sqrt(2 * variance / PASSES)).all()
    fourth = ((own - own.mean(0)) ** 4).mean(0)
    assert (np.abs(got.variance - variance) < 5 * np.sqrt(2 * (fourth - variance**2) / PASSES)).all()
    assert (variance > 1e-6).all()
    return model


# -- hooks ------------------------------------------------------------------------------------------------------------


class HooksItself(nn.Module):
    """Registers a hook at its first forward, as networks of transformers do; it may decide by a value."""

    def __init__(self, *, decides: bool) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1)
        self.ready, self.decides = False, decides

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.one.register_forward_hook(lambda module, given, out: out + 1)
            self.one.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
            self.ready = True
        out: Tensor = self.two(self.drop(self.one(x)))
        return -out if self.decides and float(out.detach().sum()) < -1e6 else out


@pytest.mark.parametrize("decides", [False, True])
def test_a_hook_that_a_forward_registers_counts_once_and_is_not_the_users(decides: bool) -> None:
    net = HooksItself(decides=decides).eval()
    model = mcdrop.wrap(net, example=X)
    twice = [mcdrop.predict(model, X, passes=20) for _ in range(2)]
    assert not net.ready
    assert not net.one._forward_hooks
    assert not net.one._forward_pre_hooks
    with torch.no_grad():
        expected = net.two(net.one(2 * X) + 1).numpy()
    for got in twice:
        assert np.abs(got.deterministic - expected).max() < 1e-6
    agrees(net.train())


class TakesItsHookOff(nn.Module):
    """Has a hook that its forwards take off by its handle, which stands on the network and around the hook."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop = nn.Linear(4, 4), nn.Dropout(0.3)
        self.handle = self.one.register_forward_hook(lambda module, given, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.one(x))
        self.handle.remove()
        return out


def test_a_handle_that_a_forward_uses_takes_no_hook_off_the_users_network() -> None:
    net = TakesItsHookOff().eval()
    mcdrop.predict(mcdrop.wrap(net, example=X), X, passes=20)
    assert len(net.one._forward_hooks) == 1
    net(X)
    assert not net.one._forward_hooks


# -- weights ----------------------------------------------------------------------------------------------------------


class WeightDrop(nn.Module):
    """Sets the dropped weight of a layer under the name of a parameter that it has moved away.

    In eval ``F.dropout`` gives the parameter itself, which torch then registers under that name.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        weight = getattr(layer, name)
        del layer._parameters[name]
        layer.register_parameter(f"{name}_raw", nn.Parameter(weight.data))

    def forward(self, x: Tensor) -> Any:
        raw = getattr(self.layer, f"{self.name}_raw")
        setattr(self.layer, self.name, F.dropout(raw, 0.4, self.training))
        return self.layer(x)


def test_a_weight_that_a_forward_sets_in_place_of_a_parameter_is_drawn_and_the_network_is_as_it_was() -> None:
    net = nn.Sequential(WeightDrop(nn.Linear(4, 6), "weight"), nn.ReLU(), nn.Linear(6, 1))
    names = [*net.state_dict()]
    model = agrees(net)
    assert [*net.state_dict()] == names
    net.eval()(X)  # from here on torch holds the parameter twice, and such a network can be trained no more
    assert [*net.state_dict()] != names
    again = mcdrop.wrap(net, example=X)
    both = [mcdrop.predict(one, X, passes=50) for one in (model, again)]
    assert np.abs(both[0].variance - both[1].variance).max() < 1e-6


class Tied(nn.Module):
    """Has one weight under two names, and sets one of them again, or writes to it."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.one, self.drop, self.in_place = nn.Parameter(torch.randn(4)), nn.Dropout(0.3), in_place
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(x * self.two) * self.one
        if self.in_place:
            self.one.data.clamp_(-1, 1)
        self.two = self.one
        return out


def test_a_weight_under_two_names_may_be_set_again_but_not_written_to() -> None:
    net = Tied(in_place=False)
    before = [*net.state_dict()]
    agrees(net)
    assert [*net.state_dict()] == before
    assert net.one is net.two
    wrong = Tied(in_place=True)
    kept = wrong.one.detach().clone()
    with pytest.raises(ModelRefused, match="writes to its parameter"):
        mcdrop.wrap(wrong, example=X)
    assert torch.equal(wrong.one, kept)


class TiedBuffers(nn.Module):
    """Counts in a buffer that it has under two names."""

    one: Tensor
    two: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(4))
        self.register_buffer("two", self.one)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.one.mul_(2)
        out: Tensor = self.drop(x) * self.two
        return out


def test_what_is_written_to_under_one_name_is_read_under_the_other() -> None:
    net = TiedBuffers()
    model = mcdrop.wrap(net, example=X)
    for _ in range(2):
        assert np.abs(mcdrop.predict(model, X, passes=20).deterministic - 2 * X.numpy()).max() < 1e-6
    assert torch.equal(net.one, torch.ones(4))


class Language(nn.Module):
    """Sets a weight of its recurrent layer, and keeps the layer's state for its next call, as AWD-LSTM does."""

    def __init__(self) -> None:
        super().__init__()
        self.out, layer = nn.Linear(5, 1), nn.LSTM(4, 5, batch_first=True)
        weight: Any = layer.weight_hh_l0
        self.layer: Any = layer
        del self.layer.weight_hh_l0
        self.raw = nn.Parameter(weight.data * 4)
        self.layer.weight_hh_l0 = weight.clone()
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight_hh_l0 = F.dropout(self.raw, 0.5) if self.training else self.raw.clone()
        steps, state = self.layer(x, self.state)
        self.state = tuple(part.detach() for part in state)
        out: Tensor = self.out(steps[:, -1])
        return out


def test_a_recurrent_network_that_sets_a_weight_and_keeps_its_state_follows_its_other_weights() -> None:
    net, x = Language(), torch.randn(3, 6, 4)

    def fresh(given: Tensor) -> Tensor:
        net.state = None
        out: Tensor = net(given)
        return out

    model = mcdrop.wrap(net, example=x)
    for _ in range(2):
        got = mcdrop.predict(model, x, passes=PASSES, sampler="iid")
        with torch.no_grad():
            own = torch.stack([fresh(x) for _ in range(PASSES)]).numpy().astype(float)
        error = np.sqrt(2 * own.var(0) / PASSES)
        assert (np.abs(got.mean - own.mean(0)) < 5 * error).all()
        assert (np.abs(got.variance / own.var(0) - 1) < 0.2).all()
        net.layer.weight_ih_l0.data *= 3


# -- modules that none registers --------------------------------------------------------------------------------------


class Cell(nn.Module):
    """Keeps a mask for all calls of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(x), 0.3)
        out: Tensor = self.linear(x * self.mask)
        return out


class Apart(nn.Module):
    """Has its cell where torch does not look for modules."""

    def __init__(self, place: Callable[[Any], Any], taken: Callable[[Any], Cell]) -> None:
        super().__init__()
        cell = Cell()
        self.place, self.weights, self.out = place(cell), nn.ParameterList(cell.parameters()), nn.Linear(4, 1)
        self.taken = taken

    def forward(self, x: Tensor) -> Tensor:
        cell = self.taken(self.place)
        for _ in range(2):
            x = cell(x)
        cell.mask = None
        out: Tensor = self.out(x)
        return out


PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda cell: [cell], lambda place: place[0]),
    "dicts": (lambda cell: {"a": {"b": cell}}, lambda place: place["a"]["b"]),
    "object": (lambda cell: SimpleNamespace(cell=cell), lambda place: place.cell),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_module_that_none_registers_keeps_nothing_of_what_passes_leave(place: str) -> None:
    net = Apart(*PLACES[place])
    agrees(net)
    assert net.taken(net.place).mask is None
    net(X)
