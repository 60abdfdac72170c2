"""The live shadow: shares what a network learns, owns what a pass may change."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

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
