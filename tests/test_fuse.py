"""Layers handed to oneDNN with what follows them, and folded weights that are kept until a weight changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import Operations, apart, loop, made, passes
from devices import on_each_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mcdrop
from mcdrop.onednn import FLOPS, available, conv_add_relu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch comes without oneDNN")

IMAGES = torch.randn(9, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Sums(nn.Module):
    """Convolutions whose sum with something else is cut off below 0."""

    def __init__(self, after: Callable[["Sums", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(a, 4, 3, padding=1) for a in (2, 4, 4))
        self.dropout, self.head, self.after = nn.Dropout2d(0.3), nn.Linear(4, 2), after

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        h = self.after(self, first, self.dropout(first))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


# What a sum may be of: (the network, what was before the draw, what came out of it) -> features.
SUMS: dict[str, Callable[[Sums, Tensor, Tensor], Tensor]] = {
    "two convolutions": lambda net, x, h: F.relu(net.two(h) + net.three(h)),
    "one of them twice": lambda net, x, h: F.relu((y := net.two(h)) + y),
    "with what is read before": lambda net, x, h: F.relu(net.two(torch.sigmoid(h)) + torch.tanh(h)),
    "with what is read later": lambda net, x, h: F.relu(net.two(h) + (y := torch.tanh(h))) * y,
    "with a view of what is read later": lambda net, x, h: F.relu(net.two(h) + (y := torch.tanh(h)).view_as(h)) * y,
    "with what is the same in all passes": lambda net, x, h: F.relu(net.two(h) + torch.sigmoid(x)),
    "with one number a channel": lambda net, x, h: F.relu(net.two(h) + h.mean((2, 3), keepdim=True)),
    "read twice itself": lambda net, x, h: F.relu(y := net.two(h) + torch.tanh(h)) * y,
    "read without it": lambda net, x, h: F.relu(y := net.two(h)) * y,
    "a ReLU that is read again": lambda net, x, h: (y := F.relu(net.two(h))) + net.three(y),
    "a multiple": lambda net, x, h: F.relu(torch.add(torch.tanh(h), net.two(h), alpha=2)),
}


@pytest.mark.parametrize("name", SUMS)
@on_each_device
def test_a_sum_that_a_convolution_takes_over_is_that_of_the_network(name: str, device: str) -> None:
    torch.manual_seed(0)
    net, x = Sums(SUMS[name]).eval().to(device), IMAGES.to(device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows, count in ((9, 5), (1, 3), (4, 1)):
        for _ in range(3):  # what was written over by the first would show in the second
            assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5


class Block(nn.Module):
    """A residual block after a draw, with norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout2d(0.3), nn.Linear(4, 2)
        self.branch = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False))
        self.around = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        out: Tensor = self.head(F.relu(self.last(self.branch(h)) + self.around(h)).mean((2, 3)))
        return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_one_kernel_does_what_follows_a_convolution_on_a_gpu(precision: str) -> None:
    """Norms too, which are then folded into nothing; with few digits channels stay last all the way."""
    torch.manual_seed(0)
    net, x = Block().train().to("cuda"), IMAGES.to("cuda")
    net(x)  # running statistics
    model = mcdrop.wrap(net.eval(), example=x[:4], precision=precision)
    with Operations() as ran:
        got = passes(model, x, 4)
    convolutions = ran.named("aten.conv2d")
    assert len(convolutions) == 3
    assert all(bias is None for args in convolutions for bias in args[2:3])  # what is left out is not named
    assert ran.named("aten.relu") == ran.named("aten.add.Tensor") == ran.named("rsqrt") == []
    if precision != "fp32":
        (inner,) = (args[0] for args in convolutions if args[0].shape[1] == 4)
        assert inner.is_contiguous(memory_format=torch.channels_last)
    assert apart(got, loop(model, x, 4)) < (1e-5 if precision == "fp32" else 2e-2)


def test_sums_and_relus_are_part_of_the_convolutions() -> None:
    model = mcdrop.wrap(Sums(SUMS["two convolutions"]).eval(), example=IMAGES[:4])
    with Operations() as ran:
        passes(model, IMAGES, 4)
    assert len(ran.named("mkldnn._convolution_pointwise")) == 3
    assert ran.named("aten.relu") == ran.named("aten.add.Tensor") == ran.named("aten.convolution") == []


def test_the_operations_of_fused_layers_are_counted() -> None:
    """As many as torch counts in the network's own code: a product and a sum for each weight and place."""
    x, conv, linear, count = IMAGES[:3], 3 * 2 * 4 * 36 * 9, 3 * 2 * 4 * 2, 5
    for name in ("two convolutions", "with what is read before", "with what is read later"):
        model = mcdrop.wrap(Sums(SUMS[name]).eval(), example=x)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            passes(model, x, count)
        branches = 2 if name == "two convolutions" else 1
        assert counter.get_total_flops() == conv * (2 + 4 * branches * count) + linear * count
    net = nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    model = mcdrop.wrap(net, example=torch.ones(3, 8), precision="bf16")
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        passes(model, torch.ones(3, 8), count)
    assert counter.get_total_flops() == 2 * 3 * count * (8 * 16 + 16 * 2)


@pytest.mark.skipif(not available(torch.bfloat16, torch.device("cpu")), reason="this processor has no bfloat16")
def test_linear_layers_in_bfloat16_add_their_bias_and_relu_as_they_write() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.4), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    x = torch.randn(9, 4)
    model = mcdrop.wrap(net, example=x[:4], precision="bf16")
    with Operations() as ran:
        got = passes(model, x, 5)
    assert [args[3] for args in ran.named("mkldnn._linear_pointwise")] == ["none", "relu", "none"]
    assert ran.named("aten.relu") == ran.named("addmm") == []
    assert apart(got, loop(model, x, 5)) < 2e-2


@pytest.mark.skipif(not available(torch.float32, torch.device("cpu")), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_few_units_are_onednns_where_there_are_many_rows(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, 10, bias=bias)).eval()
    x = torch.randn(205, 4)
    model = mcdrop.wrap(net, example=x[:4])
    for count, products in ((204, 0), (205, 1)):  # times five: 1020 and 1025
        with Operations() as ran:
            got = passes(model, x[:count], 5)
        assert len(ran.named("mkldnn._linear_pointwise")) == products
        assert apart(got, loop(model, x[:count], 5)) < 1e-5


def test_a_sum_with_fewer_images_never_reaches_onednn() -> None:
    """It would read past the end of their memory."""
    images, others = torch.randn(4, 2, 5, 5), torch.randn(3, 2, 5, 5)
    with pytest.raises(RuntimeError, match=r"takes as many others, got \(3, 2, 5, 5\)"):
        conv_add_relu(others, images, None, None, [1, 1], [0, 0], [1, 1], 1)


# -- folded once -------------------------------------------------------------------------------------------------------


def test_weights_are_folded_once_and_again_after_any_write() -> None:
    """Also after writes that torch does not count, through ``.data``."""
    net, x = made("residual")
    model = mcdrop.wrap(net, example=x[:4])
    passes(model, x, 3)

    def folds() -> int:
        with Operations() as ran:
            passes(model, x, 3)
        return len(ran.named("rsqrt")) + len(ran.named("_reorder_convolution_weight"))

    assert folds() == 0
    for name, tensor in net.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or name.startswith("head"):
            continue
        before = passes(model, x, 3)
        tensor.data.mul_(1.5).add_(0.1)
        assert folds() > 0, name
        assert folds() == 0
        assert apart(passes(model, x, 3), before) > 1e-4, name
        tensor.data = tensor.data.clone() * 0.8
        assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5, name


class Tied(nn.Module):
    """A weight that is read as it is, turned round, and as part of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        turned = self.weight.t()
        h = F.linear(F.dropout(F.linear(x, turned), 0.4, self.training), self.weight)
        return F.linear(h, torch.tanh(turned) + self.weight)


def test_a_weight_that_is_computed_with_and_looked_at_is_followed() -> None:
    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randn(7, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for write in (lambda: net.weight.data.mul_(1.3), lambda: setattr(net.weight, "data", torch.randn(4, 4))):
        assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5
        write()
        assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5
