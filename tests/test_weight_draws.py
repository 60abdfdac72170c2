"""Draws over weights (DropConnect): layers of every kind, in one graph, and draws that are larger than all rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import apart, backend_of, loop, passes
from devices import on_each_device
from torch import Tensor, nn
from torch.func import functional_call

import mcdrop
from mcdrop.layers import DropConnect
from mcdrop.masks import Site, sample_masks
from mcdrop.rows import Rows
from mcdrop.trace import trace

P = 0.3
PASSES = 5


class Dropped(nn.Module):
    """A layer some of whose parameters are dropped, all rows alike; its input has been through a draw, or not."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...], first: float) -> None:
        super().__init__()
        self.layer, self.names, self.before, self.head = layer, names, nn.Dropout(first), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: F.dropout(getattr(self.layer, name), P, self.training) for name in self.names}
        out: Tensor = self.head(functional_call(self.layer, weights, (self.before(x),)).flatten(1))
        return out


IMAGE, STEPS, UNITS = (4, 6, 6), (5, 4), (4,)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), ("weight",), UNITS),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, padding=1), ("weight", "bias"), STEPS),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), ("weight",), IMAGE),
    "conv2d, bias alone": (lambda: nn.Conv2d(4, 6, 3), ("bias",), IMAGE),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), ("weight", "bias"), IMAGE),
    "conv2d without bias": (lambda: nn.Conv2d(4, 3, 2, dilation=2, bias=False), ("weight",), IMAGE),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), ("weight",), (4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), ("weight",), IMAGE),
    "batch norm": (lambda: nn.BatchNorm2d(4), ("weight", "bias"), IMAGE),
    "layer norm": (lambda: nn.LayerNorm(4), ("weight",), STEPS),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def wrapped(name: str, first: float, device: str = "cpu", **asked: Any) -> tuple[mcdrop.Model, Dropped, Tensor]:
    make, names, shape = LAYERS[name]
    torch.manual_seed(0)
    net, x = Dropped(make(), names, first).eval(), torch.randn(9, *shape)
    net(x)
    net, x = net.to(device), x.to(device)
    return mcdrop.wrap(net, example=x[:4], **asked), net, x


@pytest.mark.parametrize("first", [0.0, 0.4], ids=["of rows that are the same", "of rows that differ"])
@every_layer
@on_each_device
def test_layers_with_weights_that_differ_from_pass_to_pass_are_captured(name: str, first: float, device: str) -> None:
    """Equal to the loop for one row, few and many, which take other ways; and to torch's layer under each mask."""
    model, net, x = wrapped(name, first, device)
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows in (x, x[:3], x[:1]):
        assert apart(passes(model, rows, PASSES), loop(model, rows, PASSES)) < 1e-5
    if not first:
        assert apart(passes(model, x, PASSES), by_hand(net, x)) < 1e-5


@torch.no_grad()
def by_hand(net: Dropped, x: Tensor) -> Tensor:
    """Passes of torch's own layer, its weights multiplied with the masks of a seed."""
    named = [*net.names]
    weights = {name: net.layer.get_parameter(name) for name in named}
    sites = [Site(f"site{i}", tuple(weights[name].shape), P) for i, name in enumerate(named)]
    masks = sample_masks(sites, PASSES, seed=0)
    outputs = []
    for t in range(PASSES):
        kept = [torch.from_numpy(masks[site.name][t]).to(x) / (1 - P) for site in sites]
        dropped = {name: weights[name] * factor for name, factor in zip(named, kept, strict=True)}
        outputs.append(net.head(functional_call(net.layer, dropped, (x,)).flatten(1)))
    return torch.stack(outputs).cpu()


class OneWeight(nn.Module):
    """A convolution whose weight is dropped, with a bias or without."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.conv.weight, P, self.training)
        return F.conv2d(x, weight, self.conv.bias, padding=1).mean((2, 3))


def test_layers_that_differ_in_a_bias_alone_do_not_stand_for_one_another() -> None:
    """Neither two networks, of which one is wrapped later, nor two layers of one network."""
    torch.manual_seed(0)
    one, other, x = OneWeight(True).eval(), OneWeight(False).eval(), torch.randn(6, 2, 5, 5)
    first = mcdrop.wrap(one, example=x)
    second = mcdrop.wrap(other, example=x)
    for model in (first, second, mcdrop.wrap(nn.Sequential(one, nn.Unflatten(1, (2, 2, 1)), other), example=x)):
        assert model.audit.tier == "captured", model.audit.tier_reason
        assert apart(passes(model, x, PASSES), loop(model, x, PASSES)) < 1e-5


@on_each_device
def test_they_are_compiled_and_run_in_half_precision_too(device: str) -> None:
    exact, _, x = wrapped("conv2d", 0.4, device)
    compiled, _, _ = wrapped("conv2d", 0.4, device, compile=True)
    half, _, _ = wrapped("conv2d", 0.4, device, precision="bf16")
    expected = passes(exact, x, PASSES)
    assert apart(passes(compiled, x, PASSES), expected) < 1e-5
    assert apart(passes(half, x, PASSES), expected) < 3e-2


class WeightDrop(nn.Module):
    """The usual way for recurrent layers (Merity et al. 2018, section 2): weights are set anew in every forward."""

    def __init__(self, layer: nn.RNNBase, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layer, self.names, self.head = layer, names, nn.LazyLinear(2)
        for name in names:
            weight = getattr(layer, name)
            delattr(layer, name)
            self.register_parameter(f"{name}_raw", weight)
            setattr(layer, name, weight.detach().clone())
        layer.flatten_parameters = lambda: None  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            raw = self.get_parameter(f"{name}_raw")
            setattr(self.layer, name, F.dropout(raw, P) if self.training else raw.clone())
        out: Tensor = self.head(self.layer(x)[0].flatten(1))
        return out


RECURRENT: dict[str, tuple[Callable[[], nn.RNNBase], tuple[str, ...]]] = {
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), ("weight_hh_l0",)),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), ("weight_hh_l0", "weight_ih_l0")),
    "rnn": (lambda: nn.RNN(4, 3, batch_first=True), ("bias_hh_l0",)),
    "both ways": (
        lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.4, bidirectional=True, batch_first=True),
        ("weight_hh_l1_reverse", "weight_hh_l0"),
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
@on_each_device
def test_recurrent_layers_whose_weights_are_dropped_are_captured(name: str, device: str) -> None:
    make, names = RECURRENT[name]
    torch.manual_seed(0)
    net, x = WeightDrop(make(), names).eval(), torch.randn(9, 5, 4)
    net(x)
    net, x = net.to(device), x.to(device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert len(model.audit.live) == len(names) + (name == "both ways")
    for rows in (x, x[:1]):
        assert apart(passes(model, rows, PASSES), loop(model, rows, PASSES)) < 1e-5
    found = mcdrop.sample(model, x, mcdrop.PassPlan(1000))
    with torch.no_grad():
        each = torch.stack([net.cpu().train()(x.cpu()) for _ in range(2000)])
    error = (each.var(0).numpy() / 2000 + found.variance / 1000) ** 0.5
    assert (np.abs(found.mean - each.mean(0).numpy()) < 4.5 * error).all()  # of 18 numbers
    assert np.abs(np.log(found.variance / each.var(0).numpy())).max() < 0.3  # 5.5 standard errors of a normal's


# -- draws that are larger than all rows -------------------------------------------------------------------------------


def large(units: int = 300) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, units), nn.ReLU(), DropConnect(nn.Linear(units, units), P), nn.Linear(units, 1))
    return net.eval(), torch.randn(20, 4)


def test_weights_under_a_mask_count_once_for_all_rows() -> None:
    net, x = large()
    found = trace(net.train(), Rows.of(x[:4]), lambda output: output)
    assert found.row_bytes == found.pass_bytes == 4 * 300
    assert found.shared_bytes == 4 * 300 * 300


def test_passes_with_large_draws_are_those_of_the_masks_however_they_are_cut() -> None:
    net, x = large()
    model = mcdrop.wrap(net, example=x[:4])
    mask = sample_masks([Site("site0", (300, 300), P)], 40, seed=3, start=50, sampler="balanced")["site0"]
    with torch.no_grad():
        before, weight, bias = net[:2](x), net[2].layer.weight, net[2].layer.bias  # type: ignore[index]
        each = [net[3](F.linear(before, weight * torch.from_numpy(one) / (1 - P), bias)) for one in mask]  # type: ignore[index]
    for memory in (
        1,
        8 * 4 * 4 * (300 * 300 + 20 * 300),
        2**30,
    ):  # a pass at a time, parts of blocks of passes, and all
        backend_of(model).chunk_bytes = memory
        block = model.backend.block(model.rows(x))
        parts = [
            block.forward(min(block.most, 90 - start), seed=3, start=start, sampler="balanced")
            for start in range(50, 90, min(block.most, 40))
        ]
        assert apart(np.concatenate(parts)[:40], torch.stack(each)) < 1e-5


def test_rows_are_not_cut_where_all_share_what_is_large() -> None:
    """Each block of rows would draw all weights anew."""
    net, x = large()
    model = mcdrop.wrap(net, example=x[:4])
    backend_of(model).chunk_bytes = 4 * 4 * 300 * 2  # two rows
    counted: list[int] = []
    block = model.backend.block
    model.backend.block = lambda rows, **how: counted.append(rows.count) or block(rows, **how)  # type: ignore[method-assign, func-returns-value]
    mcdrop.sample(model, x, mcdrop.PassPlan(4))
    assert counted == [20]
