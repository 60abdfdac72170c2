"""Layers between an image, a draw and an image again: each stays whole in a captured graph."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captures import apart, loop, passes
from devices import on_each_device
from torch import Tensor, nn

import mcdrop

CHANNELS = 4
Layers = dict[str, Callable[[], nn.Module]]


class Function(nn.Module):
    """A layer that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class There(nn.Module):
    """Reads an image elsewhere, at places that follow from it."""

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, :2].movedim(1, -1).tanh()
        return F.grid_sample(x, places, align_corners=False)


class Unpooled(nn.Module):
    """Puts the largest numbers of a pool back where they stood."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{inner}d")(2, return_indices=True)
        self.back = getattr(nn, f"MaxUnpool{inner}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.back(*self.pool(x))
        return out


def transposed(inner: int) -> nn.Module:
    kind = getattr(nn, f"ConvTranspose{inner}d")
    out: nn.Module = kind(CHANNELS, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    return out


IMAGE: Layers = {
    "transposed": lambda: transposed(2),
    "same": lambda: nn.Conv2d(CHANNELS, 3, 3, padding="same", dilation=2),
    "same, one side more": lambda: nn.Conv2d(CHANNELS, 3, (4, 3), padding="same"),
    "valid": lambda: nn.Conv2d(CHANNELS, 3, 3, padding="valid"),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
    "bicubic": lambda: nn.Upsample(size=(7, 9), mode="bicubic"),
    "area": lambda: Function(lambda x: F.interpolate(x, size=(3, 4), mode="area")),
    "as another": lambda: Function(lambda x: F.interpolate(x, size=x[..., :4, :3].shape[-2:])),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((None, 3)),
    "adaptive largest": lambda: nn.AdaptiveMaxPool2d(3),
    "average, borders left out": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "largest, rounded up": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "largest, dilated": lambda: nn.MaxPool2d(2, dilation=2),
    "power": lambda: nn.LPPool2d(2, 2),
    "unpooled": lambda: Unpooled(2),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "instance, known": lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    "local response": lambda: nn.LocalResponseNorm(3),
    "zeros around": lambda: nn.ZeroPad2d((1, 2, 0, -1)),
    "reflected": lambda: nn.ReflectionPad2d(2),
    "replicated": lambda: nn.ReplicationPad2d((0, 1, 2, 3)),
    "circular": lambda: nn.CircularPad2d(1),
    "to pixels": lambda: nn.PixelShuffle(2),
    "from pixels": lambda: nn.PixelUnshuffle(2),
    "channels mixed": lambda: nn.ChannelShuffle(2),
    "patches": lambda: nn.Unfold(2, stride=2),
    "patches and back": lambda: nn.Sequential(nn.Unfold(3), nn.Fold((6, 6), 3)),
    "elsewhere": There,
    "frequencies": lambda: Function(lambda x: torch.fft.irfft2(torch.fft.rfft2(x)[..., :3], s=(6, 4)).tanh()),
}
SEQUENCE: Layers = {
    "transposed": lambda: transposed(1),
    "linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
    "adaptive average": lambda: nn.AdaptiveAvgPool1d(2),
    "adaptive largest": lambda: nn.AdaptiveMaxPool1d(2),
    "average": lambda: nn.AvgPool1d(2),
    "largest": lambda: nn.MaxPool1d(2, stride=1),
    "unpooled": lambda: Unpooled(1),
    "instance": lambda: nn.InstanceNorm1d(CHANNELS),
    "zeros around": lambda: nn.ConstantPad1d((0, 3), 0.5),
    "frequencies": lambda: Function(lambda x: torch.fft.rfft(x, dim=1).abs()),
}
VOLUME: Layers = {
    "transposed": lambda: transposed(3),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "adaptive average": lambda: nn.AdaptiveAvgPool3d(2),
    "largest": lambda: nn.MaxPool3d(2),
    "average": lambda: nn.AvgPool3d(2),
    "unpooled": lambda: Unpooled(3),
}
TABLES = {"images": ((6, 6), IMAGE), "sequences": ((6,), SEQUENCE), "volumes": ((4, 4, 4), VOLUME)}


class Beside(nn.Module):
    """Layers side by side, after a draw or before it, each with numbers of its own."""

    def __init__(self, layers: list[nn.Module], after: bool) -> None:
        super().__init__()
        self.layers, self.after, self.drop = nn.ModuleList(layers), after, nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x) if self.after else x
        out = torch.cat([layer(x).flatten(1) for layer in self.layers], 1)
        return out if self.after else self.drop(out)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("after", [True, False], ids=["after a draw", "before it"])
@pytest.mark.parametrize("kind", TABLES)
@on_each_device
def test_layers_of_images_are_captured(kind: str, after: bool, device: str) -> None:
    torch.manual_seed(0)
    sizes, table = TABLES[kind]
    x = torch.randn(9, CHANNELS, *sizes, device=device)
    net = Beside([made() for made in table.values()], after).to(device).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows in (x, x[:1]):
        assert apart(passes(model, rows, 4), loop(model, rows, 4)) < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", TABLES)
def test_layers_of_images_are_captured_in_a_program(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes, table = TABLES[kind]
    x, net = torch.randn(9, CHANNELS, *sizes), Beside([made() for made in table.values()], after=True).eval()
    model = mcdrop.wrap(net, example=x[:4])
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2"))
    assert loaded.audit.tier == "captured", loaded.audit.tier_reason
    assert apart(passes(loaded, x, 4), loop(model, x, 4)) < 1e-5


class Segments(nn.Module):
    """As SegNet with dropout (Kendall et al. 2015): pools say where their numbers stood, unpooling puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5))
        self.up = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, first = F.max_pool2d(self.down(x), 2, return_indices=True)
        x, second = F.max_pool2d(self.middle(x), 2, return_indices=True)
        x = self.up(F.max_unpool2d(x, second, [2, 2]))
        out: Tensor = self.last(F.max_unpool2d(x, first, [2, 2]))
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_each_device
def test_a_segmenting_network_is_captured(precision: str, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 3, 8, 8, device=device)
    net = Segments().to(device).eval()
    model = mcdrop.wrap(net, example=x[:4], precision=precision)
    assert model.audit.tier == "captured", model.audit.tier_reason
    got, expected = passes(model, x, 4), loop(model, x, 4)
    if precision == "fp32":
        assert apart(got, expected) < 1e-5
    else:
        assert (got - expected).square().mean().sqrt() < 0.2 * expected.var(0).mean().sqrt()


def test_padding_rows_is_not_taken_for_padding_images() -> None:
    """It makes other rows, which no pass may have; a row alone then stands beside a row of zeros."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.first(x).relu(), 0.4, self.training)
            out: Tensor = self.last(F.pad(h, (0, 0, 0, 1)))[:-1]
            return out

    torch.manual_seed(0)
    x = torch.randn(9, 3)
    model = mcdrop.wrap(Doubled(), example=x[:4])
    assert apart(passes(model, x, 4), loop(model, x, 4)) < 1e-5
