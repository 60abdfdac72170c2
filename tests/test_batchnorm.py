"""Batch norm's running statistics, fitted to a network under its own dropout."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from made import Frame
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mcdrop
from mcdrop.errors import InputError
from mcdrop.layers import DropConnect


def shifted(p: float = 0.5) -> tuple[nn.Sequential, Tensor]:
    """Batch norm behind dropout, with statistics that are exact without it: inputs of mean 0 and variance 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(6), nn.Linear(6, 1)).eval()
        x = torch.randn(3000, 6)
    return net, (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.statistical
def test_statistics_become_those_under_masks() -> None:
    net, x = shifted(p=0.5)
    model = mcdrop.wrap(net, example=x[:8])
    for mean in (0, 3):
        copy = mcdrop.recalibrate_batchnorm(model, x + mean, passes=10, batch_rows=500)
        # of inverted dropout E[h^2] / (1 - p) - E[h]^2, its error from the fourth central moment of half zeros
        expected = (1 + mean**2) / 0.5 - mean**2
        fourth = (mean**4 + mean**4 + 24 * mean**2 + 48) / 2
        for name, law, error in (
            ("1.running_var", expected, np.sqrt((fourth - expected**2) / 30000)),
            ("1.running_mean", mean, np.sqrt(expected / 30000)),
        ):
            assert np.abs(copy.get_buffer(name).numpy() - law).max() < 4 * error


@pytest.mark.statistical
def test_statistics_are_those_of_training_behind_one_another() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (4, 16):
        layers += [nn.Linear(width, 16), nn.ReLU(), nn.Dropout(0.4), nn.BatchNorm1d(16)]
    net, x = nn.Sequential(*layers, nn.Linear(16, 1)), torch.randn(2000, 4)
    trained, norms = deepcopy(net).train(), ("3", "7")
    for name in norms:
        vars(trained.get_submodule(name))["momentum"] = None  # a plain average
    with torch.no_grad():
        for _ in range(10):
            for batch in x.split(500):
                trained(batch)
    ours = mcdrop.recalibrate_batchnorm(mcdrop.wrap(net.eval(), example=x[:8]), x, passes=10, batch_rows=500)
    for name in norms:
        var, theirs = (one.get_buffer(f"{name}.running_var") for one in (ours, trained))
        assert float((var / theirs)[theirs > 1e-3].median()) == pytest.approx(1, abs=0.03)


def test_a_mask_of_weights_is_that_of_all_rows() -> None:
    """Then E[h]^2 is no part of the variance, as it is where every row has a mask of its own: of the sum of w^2 = 6."""
    layer = DropConnect(nn.Linear(6, 1, bias=False), 0.5)
    net, (_, x) = nn.Sequential(layer, nn.BatchNorm1d(1), nn.Linear(1, 1)).eval(), shifted()
    nn.init.ones_(next(layer.parameters()))
    ours = mcdrop.recalibrate_batchnorm(mcdrop.wrap(net, example=x[:8]), x + 3, passes=50, batch_rows=3000)
    assert float(ours.get_buffer("1.running_var")) == pytest.approx(6 / 0.5, abs=4 * 4 * (6 * 0.25 / 50) ** 0.5 + 0.5)


def test_the_models_own_network_is_untouched_and_weights_are_kept() -> None:
    net, x = shifted()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    copy = mcdrop.recalibrate_batchnorm(mcdrop.wrap(net, example=x[:8]), x, passes=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.training
    assert copy is not net
    for name, tensor in copy.named_parameters():
        assert torch.equal(tensor, before[name])
    assert not any(module.training for module in copy.modules())
    assert copy[1].momentum == net[1].momentum  # type: ignore[index]


def test_batches_may_come_one_by_one() -> None:
    net, x = shifted()
    model = mcdrop.wrap(net, example=x[:8])
    whole = mcdrop.recalibrate_batchnorm(model, x, passes=3, batch_rows=1000)
    labelled = DataLoader(TensorDataset(x, torch.zeros(len(x))), 1000)
    for batches in (iter(x.split(1000)), labelled):
        by_batch = mcdrop.recalibrate_batchnorm(model, batches, passes=3)
        for ours, theirs in zip(whole.buffers(), by_batch.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_rows_of_a_list_or_of_a_frame_are_those_of_the_array() -> None:
    net, x = shifted()
    names = list("abcdef")
    model = replace(mcdrop.wrap(net, example=x[:8]), features=names)
    few = x[:50] * torch.arange(1, 7)
    whole = mcdrop.recalibrate_batchnorm(model, few, passes=2)
    other = Frame(names[::-1], few.numpy()[:, ::-1])
    for rows in (few.tolist(), [tuple(row) for row in few.tolist()], other):
        again = mcdrop.recalibrate_batchnorm(model, rows, passes=2)
        for ours, theirs in zip(whole.buffers(), again.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("asked", [{"passes": 0}, {"passes": 1.5}, {"batch_rows": 0}])
def test_counts_must_be_above_0(asked: dict[str, Any]) -> None:
    net, x = shifted()
    with pytest.raises(InputError, match=f"{next(iter(asked))} must be a whole number above 0"):
        mcdrop.recalibrate_batchnorm(mcdrop.wrap(net, example=x[:8]), x, **asked)


@pytest.mark.parametrize(
    ("net", "data", "said"),
    [
        (nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 1)), torch.ones(9, 6), "no norm layer"),
        (shifted()[0], [torch.ones(1, 6)], "batch of one row"),
        (shifted()[0], iter(()), "hold no batches"),
        (shifted()[0], [], "hold no rows"),
    ],
)
def test_what_cannot_be_recalibrated_is_said(net: nn.Module, data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        mcdrop.recalibrate_batchnorm(mcdrop.wrap(net, example=torch.ones(4, 6)), data)


class Through(nn.Module):
    """Gives its norm layer what a hook has put aside, or what it has at hand."""

    def __init__(self, *, put_aside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.norm, self.put_aside = nn.Dropout(0.3), nn.BatchNorm1d(4), put_aside
        self.seen: dict[str, Tensor] = {}
        self.drop.register_forward_hook(lambda module, given, out: self.seen.update(last=out))

    def forward(self, x: Tensor) -> Tensor:
        at_hand = self.drop(x)
        out: Tensor = self.norm(self.seen["last"] if self.put_aside else at_hand)
        return out


def test_a_hook_that_has_closed_over_the_network_is_the_copys_own() -> None:
    x, fitted = torch.randn(200, 4), []
    for put_aside in (True, False):
        net = Through(put_aside=put_aside).eval()
        net(x[:1])
        last = net.seen["last"]
        fitted.append(mcdrop.recalibrate_batchnorm(mcdrop.wrap(net, example=x), x, passes=4))
        assert net.seen["last"] is last
    assert torch.equal(*(one.get_buffer("norm.running_var") for one in fitted))
