"""The live shadow: shares what a network learns, owns what a pass may change."""

import copy
import threading
import time
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mcdrop
from mcdrop.errors import ModelRefused
from mcdrop.shadow import live_shadow, unwrapped


class Odd(nn.Module):
    """Keeps modules where ``nn.Module`` does not look, bound methods, and plain state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.same = self.body[0]
        self.steps = [self.body, self.same]
        self.by_name = {"body": [self.body]}
        self.call = self.helper
        self.seen = 0
        self.history: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def helper(self, x: Tensor) -> Tensor:
        assert not self.training
        out: Tensor = self.steps[0](x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.history.append(1)
        return self.call(x)


@pytest.fixture
def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().train()


def test_every_training_flag_of_the_shadow_is_off_and_its_own(odd: Odd) -> None:
    shadow = live_shadow(odd)
    assert not any(module.training for module in shadow.modules())
    shadow.get_submodule("body.2").training = True
    assert all(module.training for module in odd.modules())
    odd.eval()
    assert shadow.get_submodule("body.2").training


def test_the_shadow_has_the_same_tree_and_the_same_tensors(odd: Odd) -> None:
    shadow = live_shadow(odd)
    assert isinstance(shadow, Odd)
    assert [*dict(shadow.named_modules())] == [*dict(odd.named_modules())]
    ours, theirs = [dict((*m.named_parameters(), *m.named_buffers())) for m in (shadow, odd)]
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    assert shadow.same is shadow.body[0] is shadow.steps[1]
    assert shadow.same is not odd.same


def test_modules_in_containers_and_bound_methods_point_at_the_shadow(odd: Odd) -> None:
    shadow = live_shadow(odd)
    assert isinstance(shadow, Odd)
    assert shadow.steps[0] is shadow.by_name["body"][0] is shadow.body
    assert cast(Any, shadow.call).__self__ is shadow
    x = torch.randn(3, 2)
    torch.testing.assert_close(shadow(x), copy.deepcopy(odd).eval().body(x))


def test_running_the_shadow_leaves_the_network_untouched(odd: Odd) -> None:
    before: dict[str, Any] = copy.deepcopy(odd.state_dict())
    shadow = live_shadow(odd)
    shadow(torch.randn(3, 2))
    assert (odd.seen, odd.history) == (0, [])
    assert all(torch.equal(value, before[name]) for name, value in odd.state_dict().items())


def test_later_training_loading_and_moving_are_seen(odd: Odd) -> None:
    shadow = live_shadow(odd)
    with torch.no_grad():
        odd.get_parameter("body.0.weight").add_(1)
    assert torch.equal(shadow.get_parameter("body.0.weight"), odd.get_parameter("body.0.weight"))
    odd.load_state_dict({name: value + 1 for name, value in odd.state_dict().items()})
    assert torch.equal(shadow.get_parameter("body.0.weight"), odd.get_parameter("body.0.weight"))
    odd.double()
    assert shadow.get_parameter("body.0.weight").dtype == torch.float64
    assert shadow.get_buffer("body.1.running_mean").dtype == torch.float64


def test_hooks_run_on_the_shadow_too(odd: Odd) -> None:
    odd.body[0].register_forward_hook(lambda module, args, output: output * 0 + 7)
    shadow = live_shadow(odd)
    assert torch.equal(shadow.get_submodule("body.0")(torch.randn(3, 2)), torch.full((3, 2), 7.0))


class Taps(nn.Module):
    """Reads what a hook on one of its layers has put aside, in a dict that both hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)
        put_aside: dict[str, Tensor] = {}
        self.put_aside = put_aside
        self.layer.register_forward_hook(lambda module, args, output: put_aside.update(features=output))

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        out: Tensor = self.drop(self.put_aside["features"])
        return out


def test_what_a_hook_and_a_module_share_stays_shared_and_apart_from_the_users() -> None:
    net = Taps().eval()
    shadow, x = live_shadow(net), torch.randn(3, 2)
    assert torch.equal(shadow(x), net.layer(x))
    net.put_aside.clear()
    shadow(x)
    assert net.put_aside == {}


def test_a_compiled_module_is_unwrapped() -> None:
    net = nn.Linear(1, 1)
    compiled = torch.compile(net, backend="eager")
    assert unwrapped(compiled) is net  # type: ignore[arg-type]
    assert unwrapped(net) is net
    assert type(live_shadow(compiled)) is nn.Linear  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_a_remedy() -> None:
    scripted = torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1))
    with pytest.raises(ModelRefused, match=r"TorchScript module.*wrap the Python module it was made from"):
        live_shadow(scripted)
    with pytest.raises(ModelRefused, match="TorchScript"):
        live_shadow(nn.Sequential(scripted))


class Cached(nn.Module):
    """Drops weights, which it lets torch keep for the length of a forward, or which its caller lets it."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.one, self.two = inside, nn.Linear(4, 8), nn.Linear(8, 1)
        parametrize.register_parametrization(self.one, "weight", nn.Dropout(0.4))

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached() if self.inside else nullcontext():
            out: Tensor = self.two(self.one(x).tanh() + self.one(-x))
        return out


def test_weights_that_a_forward_keeps_are_drawn_once_in_every_pass() -> None:
    net, x, passes = Cached(inside=True), torch.randn(6, 4), 300
    model = mcdrop.wrap(net, example=x)
    assert [site.shape for site in model.audit.live] == [(8, 4)]
    std = mcdrop.predict(model, x, passes=passes, sampler="iid").std
    with torch.no_grad():
        theirs = torch.stack([net.train()(x) for _ in range(passes)]).std(0).numpy()
    assert np.abs(std / theirs - 1).max() < 4 * passes**-0.5
    net.inside = False
    with parametrize.cached():
        net.eval()(x)
        kept = parametrize._cache
        outside = mcdrop.wrap(net, example=x)
        assert np.abs(mcdrop.predict(outside, x, passes=passes, sampler="iid").std / std - 1).max() < 1e-4
        assert parametrize._cache is kept
        assert len(kept) == 1


class Watched(Cached):
    """Asks for a number on its way, so that each pass runs in Python, and lets other threads run meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached() if self.inside else nullcontext():
            h = self.one(x).tanh()
            time.sleep(1e-4)
            h = h if float(h.detach().max()) < 9 else 2 * h
            out: Tensor = self.two(h + self.one(-x))
        return out


def test_threads_whose_networks_keep_weights_get_the_answers_that_they_get_alone() -> None:
    """Torch has one place for what it keeps, and one count of who lets it, for the whole process."""
    x, nets = torch.randn(6, 4), [Watched(inside=inside) for inside in (True, True, False)]
    models = [mcdrop.wrap(net.eval(), example=x, tuning={}) for net in nets]
    assert [len(model.audit.live) for model in models] == [1, 1, 2]
    alone = [mcdrop.predict(model, x, passes=20, sampler="iid").std for model in models]
    wrong: list[object] = []

    def ask(index: int) -> None:
        try:
            for _ in range(5):
                std = mcdrop.predict(models[index], x, passes=20, sampler="iid").std
                wrong.extend([index] if np.abs(std - alone[index]).max() > 1e-5 else [])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert parametrize._cache == {}


def test_weights_that_the_users_own_forward_keeps_are_not_those_of_a_pass() -> None:
    net, x = Cached(inside=True).eval(), torch.randn(6, 4)
    model = mcdrop.wrap(net, example=x)
    expected = mcdrop.predict(model, x, passes=20)
    with parametrize.cached():
        net.one.train()
        kept = net.one.weight
        got = mcdrop.predict(model, x, passes=20)
        assert net.one.weight is kept
        assert len(parametrize._cache) == 1
    assert np.abs(got.mean - expected.mean).max() < 1e-6
    assert got.deterministic is not None
    assert expected.deterministic is not None
    assert np.abs(got.deterministic - expected.deterministic).max() < 1e-6
