"""Rewrites: what makes a graph faster leaves its values alone, and everything that it reads."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import NETS, Operations, apart, loop, made, passes, program_of, stacks_of, tensors, wrapped
from devices import on_each_device
from torch import Tensor, nn

import mcdrop

every = pytest.mark.parametrize("name", NETS)


def settled(net: nn.Module, x: Tensor) -> nn.Module:
    """Gives a network in eval whose batch norms have statistics, gains and shifts of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            size = (module.num_features,)
            module.running_mean = torch.randn(size, generator=generator)
            module.running_var = torch.rand(size, generator=generator) * 3 + 0.1
            if module.affine:
                module.weight = nn.Parameter(torch.randn(size, generator=generator))
                module.bias = nn.Parameter(torch.randn(size, generator=generator))
    return net.eval().to(x.device)


# -- batch norm --------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Reads what a convolution gives before the norm as well as after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Flatten(), nn.Linear(48, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        out: Tensor = self.head(self.norm(h) + h)
        return out


def _then_linear(size: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(size, 2))


# name: network, shape of a row, how many of its norms are left after folding
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv": (lambda: _then_linear(48, nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)), (2, 4, 4), 0),
    "conv with a bias": (lambda: _then_linear(12, nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 4, 4), 0),
    "conv in groups": (lambda: _then_linear(64, nn.Conv2d(2, 4, 1, groups=2), nn.BatchNorm2d(4)), (2, 4, 4), 0),
    "conv over time": (lambda: _then_linear(9, nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)), (2, 4), 0),
    "conv over volumes": (lambda: _then_linear(3, nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 2, 2), 0),
    "linear": (lambda: _then_linear(5, nn.Linear(4, 5), nn.BatchNorm1d(5)), (4,), 0),
    "linear without a bias": (lambda: _then_linear(5, nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)), (4,), 0),
    "without gain and shift": (lambda: _then_linear(5, nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)), (4,), 0),
    "after dropout": (
        lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), (4,), 0
    ),
    "as many steps as features": (lambda: _then_linear(9, nn.Linear(4, 3), nn.BatchNorm1d(3)), (3, 4), 1),
    "after an activation": (
        lambda: _then_linear(5, nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5)), (4,), 1
    ),
    "of the input": (lambda: _then_linear(5, nn.BatchNorm1d(4), nn.Linear(4, 5)), (4,), 1),
    "after dropped units": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.BatchNorm1d(5), nn.Linear(5, 2)), (4,), 1
    ),
    "what is read twice": (Twice, (2, 4, 4), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
@on_each_device
def test_a_folded_batch_norm_gives_what_torch_gives(name: str, device: str) -> None:
    """Running statistics, gain (also a negative one) and shift go into the layer before, where there is one alone."""
    make, shape, left = NORMS[name]
    torch.manual_seed(0)
    x = torch.randn(9, *shape, device=device)
    net = settled(make(), x)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    with Operations() as ran:
        prediction = mcdrop.predict(model, x, passes=6)
    assert len(ran.named("batch_norm")) == left
    with torch.no_grad():
        assert apart(prediction.deterministic, net(x).cpu()) < 1e-5
    assert apart(passes(model, x, 6), loop(model, x, 6)) < 1e-5


@on_each_device
def test_folded_weights_follow_the_statistics_of_today(device: str) -> None:
    x = torch.randn(9, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    net = settled(NORMS["conv"][0](), x)
    model = mcdrop.wrap(net, example=x[:4])
    before = passes(model, x, 3)
    for name, tensor in net.get_submodule("1").state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(1.7)
            now = passes(model, x, 3)
            assert apart(now, before) > 1e-3, name
            assert apart(now, loop(model, x, 3)) < 1e-5, name
            before = now


# -- writes in place ---------------------------------------------------------------------------------------------------


@every
@on_each_device
def test_writes_in_place_touch_nothing_that_a_stage_is_given(name: str, device: str) -> None:
    """Each stage is run twice on the same values: they stay as they were, and so does the answer, to the bit."""
    model, x = wrapped(name, device)
    program, rows = program_of(model, x[:5])
    leaves, stacks = [leaf for _, leaf in rows.named()], stacks_of(model, x[:5], 3)
    state = [*model.module.parameters(), *model.module.buffers()]
    with torch.no_grad():  # with gradients torch runs recurrent layers another way, to other bits
        weights, masks = program.weights(), program.masks(stacks)
        begun = program.rows(weights, leaves, 5)
        given = [*leaves, *stacks, *tensors((*weights, *masks, *begun)), *state]
        copies = [tensor.clone() for tensor in given]
        first = program.passes(weights, masks, begun, 3, 5).clone()
        for _ in range(2):
            again = program.rows(program.weights(), leaves, 5)
            assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(begun), strict=True))
            again = program.masks(stacks)
            assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(masks), strict=True))
            assert torch.equal(program.passes(weights, masks, begun, 3, 5), first)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


class Shares(nn.Module):
    """Elementwise steps on values that views, constants, the input or later steps read too."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, -2.0, 3.0, 0.5]))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu_() + 1  # the input itself is the user's
        row = self.scale.expand(2, 4).view(2, 4)[0]
        h = self.dropout(x)
        left, right = h[:, :2], h[:, 2:]
        wide = (left + 1).unsqueeze(1).expand(-1, 2, 2)
        h = (wide * 2).sigmoid() + right.unsqueeze(2) * wide
        h = h.reshape(-1, 4).add(row).mul(self.scale).tanh()
        zeros = torch.zeros_like(h)
        zeros[:, 1] = h[:, 0]
        out: Tensor = self.head(h + zeros - h.flip(1) * x)
        return out


@on_each_device
def test_values_that_are_read_again_are_not_written_over(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, device=device)
    model = mcdrop.wrap(Shares().to(device), example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    before = x.clone()
    for _ in range(2):
        for rows, count in ((7, 5), (1, 2), (2, 2)):
            assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5
    assert torch.equal(x, before)


class Flattens(nn.Module):
    """Puts steps before rows, which copies several rows and only looks at a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.randn(4, 6)), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.transpose(0, 1).reshape(-1, 4).mul(0.5).tanh()
        noise = torch.randn_like(steps) * 0.5 if self.training else torch.zeros_like(steps)
        turned = self.weight.t().contiguous().view(2, 12).view(6, 4)
        out: Tensor = F.linear(self.drop(steps + noise), turned).reshape(3, len(x), 6).mean(0)
        return out


def test_what_may_look_at_inputs_masks_or_weights_is_not_written_to_and_follows_them() -> None:
    torch.manual_seed(0)
    net, x = Flattens().eval(), torch.randn(5, 3, 4)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    before, whole = x.clone(), passes(model, x, 5)
    for _ in range(2):
        assert apart(passes(model, x[:1], 5), whole[:, :1]) < 1e-5
        assert apart(passes(model, x, 5), whole) < 1e-6
        assert torch.equal(x, before)
    with torch.no_grad():
        net.weight.mul_(3)
    assert apart(passes(model, x, 5), 3 * whole) < 1e-5


class Around(nn.Module):
    """A convolution with a way around it that reads the same image, as it is or looked at another way."""

    def __init__(self, total: Callable[[nn.Module, Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.total, self.stem, self.drop = total, nn.Conv2d(2, 32, 3, padding=1), nn.Dropout2d(0.3)
        self.body, self.head = nn.Conv2d(32, 32, size, padding=size // 2), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.stem(x).relu())
        out: Tensor = self.head(self.total(self.body, h).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "total",
    [
        lambda body, h: h + body(h),
        lambda body, h: body(h) + h,
        lambda body, h: h + body(h.flatten(2).unflatten(2, h.shape[2:])),
        lambda body, h: h.flatten(2).unflatten(2, h.shape[2:]) + body(h),
    ],
    ids=["the image first", "the convolution first", "a look at it convolved", "a look at it added"],
)
def test_a_convolution_does_not_write_over_the_image_that_it_reads(
    total: Callable[[nn.Module, Tensor], Tensor], size: int
) -> None:
    """With the kernels of other numbers of images and threads it would find what it has written itself."""
    torch.manual_seed(0)
    net, x = Around(total, size).eval(), torch.randn(4, 2, 2, 2)
    model = mcdrop.wrap(net, example=x)
    assert model.audit.tier == "captured", model.audit.tier_reason
    with Operations() as ran:
        for rows, count in ((1, 1), (1, 7), (4, 3)):
            assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5
    written = ran.named("mkldnn._convolution_pointwise_.binary")
    assert not any(one.data_ptr() == other.data_ptr() for one, other, *_ in written)


class Beside(nn.Module):
    """A wide layer, and its clipped input around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        out: Tensor = self.head(self.body(self.drop(h)) + h.clamp(max=6))
        return out


class TwoOfAWeight(nn.Module):
    """Two convolutions with one computed weight, clipped for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(6, 2, 3, 3) * 0.2), nn.Parameter(torch.ones(6, 1, 1, 1))
        self.drop, self.head = nn.Dropout2d(0.3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gain
        h = F.conv2d(x, weight).relu() + F.conv2d(x, weight.clamp(-2, 2))
        out: Tensor = self.head(self.drop(h).mean((2, 3)))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("large", ["input", "weight"])
def test_what_is_read_late_is_not_written_over(large: str, dtype: torch.dtype) -> None:
    """The example lies within the bounds, where what writes over it changes nothing; what comes later does not."""
    torch.manual_seed(0)
    net = Beside() if large == "input" else TwoOfAWeight()
    x = torch.randn(4, *((8,) if large == "input" else (2, 6, 6)), dtype=dtype)
    model = mcdrop.wrap(net.to(dtype).eval(), example=x)
    assert model.audit.tier == "captured", model.audit.tier_reason
    if isinstance(net, TwoOfAWeight):
        net.gain.data.mul_(10)
    else:
        x = x * 30
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert apart(passes(model, x, 40), loop(model, x, 40)) < close
    assert apart(mcdrop.predict(model, x, passes=16).deterministic, net(x).detach().float().numpy()) < close


# -- layout ------------------------------------------------------------------------------------------------------------


def test_images_are_convolved_with_channels_last_and_weights_keep_their_own_layout() -> None:
    net, x = made("residual")
    model = mcdrop.wrap(net, example=x[:4])
    strides = [parameter.stride() for parameter in net.parameters()]
    with Operations() as ran:
        got = passes(model, x[:9], 3)
    # what oneDNN is given; a packed weight has an order of its own
    given = [arg for args in ran.named("mkldnn._convolution_pointwise") for arg in args if isinstance(arg, Tensor)]
    images = [arg for arg in given if arg.dim() == 4 and not arg.is_mkldnn]
    assert len(images) >= 3
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
    assert [parameter.stride() for parameter in net.parameters()] == strides
    assert apart(got, loop(model, x[:9], 3)) < 1e-5
    for layout in (torch.channels_last, torch.contiguous_format):  # whatever layout the rows come in
        assert torch.equal(passes(model, x[:9].contiguous(memory_format=layout), 3), got)
    strided = torch.stack([x[:9], x[:9]], dim=-1)[..., 0]
    assert torch.equal(passes(model, strided, 3), got)


@every
@on_each_device
def test_copies_and_detours_of_the_networks_code_are_left_out(name: str, device: str) -> None:
    model, x = wrapped(name, device)
    program, rows = program_of(model, x[:5])
    stacks = stacks_of(model, x[:5], 3)
    with torch.no_grad():
        weights, masks = program.weights(), program.masks(stacks)
        begun = program.rows(weights, [leaf for _, leaf in rows.named()], 5)
        with Operations() as ran:
            program.passes(weights, masks, begun, 3, 5)
    assert ran.seen
    assert [name for name, _ in ran.seen if any(part in name for part in ("detach", "alias", "lift_fresh"))] == []


@pytest.mark.parametrize("wide", [False, True], ids=["AVX2", "AVX-512"])
def test_a_linear_layer_is_that_of_torch_on_each_kind_of_processor(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcdrop.rewrites._WIDE", wide)
    torch.manual_seed(0)
    layers = (nn.Linear(4, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 7, bias=False), nn.Linear(7, 2))
    net, x = nn.Sequential(*layers).eval(), torch.randn(9, 4)
    model = mcdrop.wrap(net, example=x[:4])
    with Operations() as ran:
        passes(model, x, 5)
    # the layer without a bias is a plain product either way
    assert (len(ran.named("aten.addmm")), len(ran.named("aten.mm"))) == ((0, 3) if wide else (2, 1))
    for rows in (1, 9):
        assert apart(passes(model, x[:rows], 5), loop(model, x[:rows], 5)) < 1e-6
