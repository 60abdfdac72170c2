"""Flags that the example's rows do not read: later rows have the variance of training, or are refused by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ModelRefused, UncontrolledDraw
from mcdrop.model import Model

_PASSES = 500
_SHORT, _LONG = 5, 9


class _Drops(nn.Module):
    """Stochastic depth, as libraries write it: a flag of its own, and a draw that is no layer of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), *(1,) * (x.dim() - 1)).bernoulli_(0.5) * 2 if self.training else x


class _Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.inner(x)[0] if x.dim() == 3 else x


class _Escapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.multinomial(torch.ones(8), 8) if self.training else x


class _Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class _Net(nn.Module):
    """Goes through a block where the rows say so; a little dropout is in every way."""

    def __init__(self, block: nn.Module, goes: Callable[["_Net", Tensor], Any]) -> None:
        super().__init__()
        self.a, self.d, self.block, self.head = nn.Linear(6, 8), nn.Dropout(0.1), block, nn.Linear(8, 2)
        self.goes = goes
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.d(torch.relu(self.a(x)))
        if self.goes(self, x):
            h = self.block(h)
        out: Tensor = self.head(h if h.dim() == 2 else h.mean(1))
        return out


class _Cap(_Net):
    """Leaves tokens of long rows out in training, so that the flag is read where it does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.d(torch.relu(self.a(x)))
        if self.training and h.shape[1] > 6:
            h = h.gather(1, torch.rand(len(h), h.shape[1]).argsort(1)[:, :3, None].expand(-1, -1, 8))
        out: Tensor = self.head(h.mean(1))
        return out


class _Jitters(_Net):
    """In training, long rows are jittered and middling ones scaled; with ``eager`` no graph can be written of it."""

    def __init__(self, block: nn.Module, goes: Callable[[_Net, Tensor], Any]) -> None:
        super().__init__(block, goes)
        self.eager = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.d(torch.relu(self.a(x)))
        if self.training and x.shape[1] > 8:
            h = h + torch.randn_like(h)
        elif self.training and x.shape[1] > 6:
            h = h * 3
        if self.eager and h.sum().item() > 1e9:
            h = h * 2
        out: Tensor = self.head(h.mean(1))
        return out


class _Experts(nn.Module):
    """A stage of which each row goes through one part: which, draws before it tell."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(make() for _ in range(8))

    def forward(self, h: Tensor) -> Tensor:
        picked, out = h.argmax(1), torch.zeros_like(h)
        for number, part in enumerate(self.parts):
            rows = (picked == number).nonzero()[:, 0]
            if rows.numel():
                out[rows] = part(h[rows])
        return out


class _Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x[:, None])[0][:, 0]
        return out


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(*[x[:, None]] * 3)[0][:, 0]
        return out


def _long(net: _Net, x: Tensor) -> bool:
    return x.shape[1] > 6


def _far(net: _Net, x: Tensor) -> Tensor:
    return (x > 50).any()


def _net(kind: type[_Net], block: nn.Module, goes: Callable[[_Net, Tensor], Any]) -> _Net:
    torch.manual_seed(0)
    return kind(block, goes).eval()


def _rows(*shape: int, far: int | None = None) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if far is not None:
        x[far, 0] = 60
    return x


def _wrapped(net: nn.Module, example: Tensor) -> Model:
    return mcdrop.wrap(net, example=example, tuning={})


def _as_in_training(model: Model, net: nn.Module, x: Tensor) -> None:
    """Compares the variance with that of torch's own training mode; each is known to some 6 %, the median better."""
    found = mcdrop.predict(model, x, passes=_PASSES, sampler="iid").variance
    net.train()
    with torch.no_grad():
        expected = torch.stack([net(x) for _ in range(_PASSES)]).var(0).numpy()
    net.eval()
    assert 0.85 < np.median(found / expected) < 1.18


@pytest.mark.parametrize("block", [nn.Dropout(0.5), _Functional(), _Drops(), _Recurrent()])
def test_what_only_longer_rows_reach_draws_there(block: nn.Module) -> None:
    net = _net(_Net, block, _long)
    model = _wrapped(net, _rows(4, _SHORT, 6))
    before = mcdrop.predict(model, _rows(4, _SHORT, 6)).variance
    _as_in_training(model, net, _rows(4, _LONG, 6))
    assert np.array_equal(mcdrop.predict(model, _rows(4, _SHORT, 6)).variance, before)


def test_a_flag_without_effect_on_the_example_is_looked_at_again_for_longer_rows() -> None:
    net = _net(_Cap, nn.Identity(), _long)
    model = _wrapped(net, _rows(4, _SHORT, 6))
    _as_in_training(model, net, _rows(4, _LONG, 6))
    _as_in_training(model, net, _rows(4, _SHORT, 6))


@pytest.mark.parametrize("eager", [False, True])
def test_answers_do_not_depend_on_which_rows_came_before(eager: bool) -> None:
    net = _net(_Jitters, nn.Identity(), _long)
    vars(net)["eager"] = eager
    found = []
    for order in ((_SHORT, 7, _LONG, _SHORT), (_LONG, 7, _SHORT, _LONG)):
        model = _wrapped(net, _rows(4, _SHORT, 6))
        assert (model.audit.tier == "captured") is not eager
        found.append({n: mcdrop.predict(model, _rows(4, n, 6), passes=20).variance for n in order})
    assert all(np.array_equal(found[0][n], found[1][n]) for n in (_SHORT, 7, _LONG))
    if not eager:
        _as_in_training(model, net, _rows(4, _LONG, 6))


def test_a_flag_that_only_computes_on_the_example_is_looked_at_again_for_longer_rows() -> None:
    net = _net(_Jitters, nn.Identity(), _long)
    _as_in_training(_wrapped(net, _rows(4, 7, 6)), net, _rows(4, _LONG, 6))


@pytest.mark.parametrize("make", [_Gru, _Attends, lambda: nn.Dropout(0.0)])
def test_layers_of_torch_that_draw_nothing_are_no_unknown_flags(make: Callable[[], nn.Module]) -> None:
    net = _net(_Net, make(), _far)
    _as_in_training(_wrapped(net, _rows(8, 6)), net, _rows(8, 6, far=3))


def test_experts_without_dropout_are_no_unknown_flags() -> None:
    net = _net(_Net, _Experts(_Gru), lambda net, x: True)
    _as_in_training(_wrapped(net, _rows(2, 6)), net, _rows(70, 6))


def test_torchs_layers_without_a_flag_cost_nothing_more_but_their_hooks_are_looked_at() -> None:
    net = _net(_Net, nn.Identity(), _far)
    net.block.register_forward_hook(lambda layer, given, out: out * torch.rand_like(out) if layer.training else out)
    model = _wrapped(net, _rows(8, 6))
    assert isinstance(model.backend, TorchBackend)
    kinds = {name: type(layer._modules) for name, layer in model.backend.live.named_children()}
    assert kinds["a"] is kinds["head"] is type(net._modules)
    assert kinds["block"] is not type(net._modules)
    with pytest.raises(UncontrolledDraw, match="one too many"):
        mcdrop.predict(model, _rows(8, 6, far=3))


@pytest.mark.parametrize("block", [nn.Dropout(0.5), _Functional(), _Drops()])
def test_rows_that_values_send_another_way_are_refused_and_the_others_are_untouched(block: nn.Module) -> None:
    net = _net(_Net, block, _far)
    model, x = _wrapped(net, _rows(8, 6)), _rows(8, 6)
    before = mcdrop.predict(model, x).variance
    for _ in range(2):
        with pytest.raises(UncontrolledDraw, match=r"one too many; to sample these, wrap the network with an example"):
            mcdrop.predict(model, _rows(8, 6, far=3))
    assert np.array_equal(mcdrop.predict(model, x).variance, before)


def test_a_buffer_that_changes_later_opens_no_silent_way() -> None:
    net = _net(_Net, _Drops(), lambda net, x: net.get_buffer("step").item() > 10)
    model = _wrapped(net, _rows(4, 6))
    net.get_buffer("step").fill_(20)
    with pytest.raises(UncontrolledDraw, match="one too many"):
        mcdrop.predict(model, _rows(4, 6))


def test_many_rows_that_go_another_way_than_few_are_refused() -> None:
    net = _net(_Net, _Drops(), lambda net, x: len(x) > 16)
    model = _wrapped(net, _rows(4, 6))
    with pytest.raises(UncontrolledDraw, match="one too many"):
        mcdrop.predict(model, _rows(32, 6))


@pytest.mark.parametrize("block", [nn.Dropout(0.5), _Drops()])
def test_any_row_of_the_example_shows_what_it_reaches(block: nn.Module) -> None:
    net, x = _net(_Net, block, _far), _rows(16, 6, far=10)
    model = _wrapped(net, x)
    assert [site.path for site in model.audit.live] == ["d", "block"]
    assert model.example.leaves[0][0, 0] == 60  # so that a saved model finds the same
    _as_in_training(model, net, x)


@pytest.mark.parametrize("block", [nn.BatchNorm1d(8), _Doubles()])
def test_flags_of_later_rows_that_draw_nothing_stay_off(block: nn.Module) -> None:
    net = _net(_Net, block, _far)
    model, x = _wrapped(net, _rows(8, 6)), _rows(8, 6, far=3)
    for part in (net.a, net.d, net.head):
        part.train()
    with torch.no_grad():
        expected = torch.stack([net(x) for _ in range(_PASSES)]).var(0).numpy()
    found = mcdrop.predict(model, x, passes=_PASSES, sampler="iid").variance
    assert 0.85 < np.median(found / expected) < 1.18


@pytest.mark.parametrize("goes", [_far, _long])
def test_a_draw_of_later_rows_that_no_mask_controls_is_named_each_time(goes: Callable[[_Net, Tensor], Any]) -> None:
    shape = (8, 6) if goes is _far else (8, _SHORT, 6)
    later = _rows(8, 6, far=3) if goes is _far else _rows(8, _LONG, 6)
    model = _wrapped(_net(_Net, _Escapes(), goes), _rows(*shape))
    for _ in range(2):
        with pytest.raises(UncontrolledDraw, match=r"that no mask controls: .*block"):
            mcdrop.predict(model, later)


def test_a_draw_of_longer_rows_in_eval_too_that_no_mask_controls_is_named() -> None:
    net = _net(_Net, nn.Identity(), lambda net, x: x.shape[1] > 6 and x.add_(torch.poisson(x.abs())) is None)
    model = _wrapped(net, _rows(4, _SHORT, 6))
    with pytest.raises(UncontrolledDraw, match="that no mask controls: poisson"):
        mcdrop.predict(model, _rows(4, _LONG, 6))


@pytest.mark.parametrize("block", [nn.Dropout(0.3), _Drops()])
def test_a_layer_that_a_draw_picks_is_no_silent_one(block: nn.Module) -> None:
    class Picks(_Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            if not self.training:
                out: Tensor = self.head(h)
                return out
            picked: Tensor = self.head(self.block(h) if torch.randint(2, (1,)).item() else torch.tanh(h))
            return picked

    with pytest.raises(ModelRefused, match=r"is random itself|training flag of block in some passes"):
        _wrapped(_net(Picks, block, _far), _rows(4, 6))


def test_a_copy_on_another_device_watches_as_well() -> None:
    net = _net(_Net, _Drops(), _far)
    model = mcdrop.wrap(net, example=_rows(8, 6), tuning={}, devices=["cpu", "cpu"])
    with pytest.raises(UncontrolledDraw):
        mcdrop.predict(model, _rows(8, 6, far=3))


def test_the_users_network_is_left_as_it_was() -> None:
    net = _net(_Net, _Drops(), _far)
    before = [(type(module._modules), vars(module)["training"]) for module in net.modules()]
    model = _wrapped(net, _rows(8, 6))
    with pytest.raises(UncontrolledDraw):
        mcdrop.predict(model, _rows(8, 6, far=3))
    assert [(type(module._modules), vars(module)["training"]) for module in net.modules()] == before
