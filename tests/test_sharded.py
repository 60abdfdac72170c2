"""Several devices: rows are shared out, and answers are those of one device. Here the devices are all the CPU."""

import numpy as np
import pytest
import torch
from captures import apart, made
from torch import nn

import mcdrop
from mcdrop.errors import InputError
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
