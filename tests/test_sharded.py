"""Several devices: rows are shared out, and answers are those of one device. Here the devices are all the CPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captures import apart, made
from torch import nn

import mcdrop
from mcdrop.errors import InputError, UncontrolledDraw
from mcdrop.sharded import ShardedBackend

CPUS = ["cpu", "cpu", "cpu"]


@pytest.mark.parametrize("name", ["mlp", "residual", "lstm"])
def test_answers_do_not_depend_on_the_number_of_devices(name: str) -> None:
    net, x = made(name)
    one, three = (mcdrop.wrap(net, example=x[:4], devices=devices) for devices in ([], CPUS))
    assert isinstance(three.backend, ShardedBackend)
    for rows in (1, 2, 3, 64):  # fewer rows than devices, as many, and a number that they do not divide
        alone, shared = mcdrop.predict(one, x[:rows]), mcdrop.predict(three, x[:rows])
        for field in ("mean", "variance", "standard_error", "deterministic"):
            assert apart(getattr(shared, field), getattr(alone, field)) < 1e-5


class Taps(nn.Module):
    """Reads what a hook has put aside, which has closed over the network; a forward of a layer may be a closure too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.drop, self.two = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)
        self.seen: dict[str, torch.Tensor] = {}
        self.lists: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {"then": [lambda x: self.two(x)]}
        self.drop.register_forward_hook(lambda module, given, out: self.seen.update(last=out))
        self.one.forward = lambda input: nn.functional.linear(input, self.one.weight, self.one.bias)  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.drop(self.one(x))
        return self.lists["then"][0](self.seen["last"])


@pytest.mark.parametrize("called", [True, False])
def test_functions_that_have_closed_over_the_network_are_each_devices_own(called: bool) -> None:
    net, x = Taps().eval(), torch.randn(6, 4)
    if called:  # what it has put aside is stale then
        net(x[:2])
    one, three = (mcdrop.wrap(net, example=x, devices=devices) for devices in ([], CPUS))
    for rows in (x, 2 * x):
        alone, shared = mcdrop.predict(one, rows), mcdrop.predict(three, rows)
        assert (alone.std > 0).all()
        assert apart(shared.std, alone.std) < 1e-5
        assert apart(shared.mean, alone.mean) < 1e-5
    with torch.no_grad():
        net.two.bias.add_(1)
    assert apart(mcdrop.predict(three, x).mean, mcdrop.predict(one, x).mean) < 1e-5


def test_rows_that_stop_early_stop_as_on_one_device() -> None:
    net, x = made("mlp")
    one, three = (mcdrop.wrap(net, example=x[:4], devices=devices) for devices in ([], CPUS))
    alone, shared = (mcdrop.predict(model, x, tolerance=0.012, max_passes=400) for model in (one, three))
    np.testing.assert_array_equal(shared.passes, alone.passes)
    assert len(set(alone.passes)) > 1
    assert apart(shared.mean, alone.mean) < 1e-5


def test_new_weights_reach_all_devices() -> None:
    """Written in place, through ``.data``, or loaded."""
    net, x = made("mlp")
    model = mcdrop.wrap(net, example=x[:4], devices=CPUS)
    before = mcdrop.predict(model, x).mean
    last = net.get_parameter("6.bias")
    with torch.no_grad():
        last.add_(1)
    assert apart(mcdrop.predict(model, x).mean, before + 1) < 1e-5
    last.data -= 2
    assert apart(mcdrop.predict(model, x).mean, before - 1) < 1e-5
    net.load_state_dict(made("mlp")[0].state_dict())
    assert apart(mcdrop.predict(model, x).mean, before) < 1e-6


def test_what_is_written_to_an_attribute_reaches_all_devices() -> None:
    net, x = made("mlp")
    net.shift = torch.zeros(4)
    net.register_forward_pre_hook(lambda module, given: (given[0] + module.shift,))
    one, three = (mcdrop.wrap(net, example=x[:4], devices=devices) for devices in ([], CPUS))
    before = mcdrop.predict(one, x).mean
    net.shift += 1
    assert apart(mcdrop.predict(one, x).mean, before) > 1e-2
    assert apart(mcdrop.predict(three, x).mean, mcdrop.predict(one, x).mean) < 1e-5


def _deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
    net = nn.Sequential(*layers).eval()
    net[4].weight = net[3].weight
    return net


def _without_bias(net: nn.Sequential) -> None:
    net[0].register_parameter("bias", None)


def _apart_from_now_on(net: nn.Sequential) -> None:
    net[4].weight = nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize("change", [nn.Module.double, _without_bias, _apart_from_now_on])
def test_weights_of_another_type_or_shape_reach_all_devices(change: Callable[[nn.Sequential], object]) -> None:
    """Also where one is missing, or no longer shared: answers are those of the network wrapped anew."""
    net, x = _deep(), torch.randn(7, 4, dtype=torch.float64)
    model = mcdrop.wrap(net, example=x, devices=CPUS[:2], tuning={})
    mcdrop.predict(model, x)
    change(net)
    anew = mcdrop.wrap(net, example=x, tuning={})
    with torch.no_grad():
        net.get_parameter("5.bias").add_(
            1e6 if change is nn.Module.double else 1
        )  # float32 would leave no digits to what differs
    for _ in range(2):
        alone, shared = mcdrop.predict(anew, x), mcdrop.predict(model, x)
        assert apart(shared.mean, alone.mean) < 1e-5
        assert apart(shared.std, alone.std) < 1e-5
        net.get_parameter("0.weight").data.mul_(2)  # seen by what is new too


def test_a_model_made_in_inference_mode_is_used_outside_of_it() -> None:
    net, x = made("mlp")
    with torch.inference_mode():
        model = mcdrop.wrap(net, example=x[:4], devices=CPUS)
    before = mcdrop.predict(model, x).mean
    with torch.no_grad():
        net.get_parameter("6.bias").add_(1)
    assert apart(mcdrop.predict(model, x).mean, before + 1) < 1e-5


def test_the_users_network_stays_where_it_is() -> None:
    net, x = made("mlp")
    before = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    mcdrop.predict(mcdrop.wrap(net, example=x[:4], devices=CPUS), x)
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == before


def test_a_closed_form_is_shared_out_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Dropout(0.4), nn.Linear(20, 2))
    x = torch.randn(7, 4)
    one, three = (mcdrop.wrap(net, example=x, devices=devices) for devices in ([], CPUS))
    alone, shared = (mcdrop.predict(model, x, exact_last=True) for model in (one, three))
    assert apart(shared.variance, alone.variance) < 1e-5


@pytest.mark.parametrize("devices", ["cpu", torch.device("cpu")])
def test_a_single_device_needs_no_list(devices: object) -> None:
    net, x = made("mlp")
    model = mcdrop.wrap(net, example=x[:4], devices=devices)
    assert model.audit.devices == ("cpu",)
    assert apart(mcdrop.predict(model, x).mean, mcdrop.predict(mcdrop.wrap(net, example=x[:4]), x).mean) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_named() -> None:
    net, x = made("mlp")
    with pytest.raises(InputError, match="device 'cuda:0' cannot be used"):
        mcdrop.wrap(net, example=x[:4], devices=["cpu", "cuda:0"])


def test_a_graph_has_no_devices(tmp_path: object) -> None:
    with pytest.raises(InputError, match="precision, compile and devices are for torch modules"):
        mcdrop.wrap("model.onnx", example=np.ones((2, 3)), devices=CPUS)  # type: ignore[arg-type]


class Longer(nn.Module):
    """Draws once more where rows say so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 2), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.drop(self.linear(x))
        return self.drop(hidden) if (x > 50).any() else hidden


@pytest.mark.parametrize("devices", [[], CPUS])
def test_rows_that_the_example_does_not_stand_for_are_refused_also_where_a_device_sees_them_first(
    devices: list[str],
) -> None:
    model = mcdrop.wrap(Longer().eval(), example=torch.ones(6, 4), devices=devices)
    with pytest.raises(UncontrolledDraw):
        mcdrop.predict(model, torch.full((6, 4), 60.0))
    mcdrop.predict(model, torch.ones(6, 4))
