"""Convolutional networks: channel dropout of every dimension, beside normalisations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import ROWS, Built, settled, specimen


def pooled(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def images(rows: int = ROWS, size: int = 8) -> Tensor:
    return torch.randn(rows, 3, size, size)


@specimen(draws=1, note="convolution, BatchNorm, relu, Dropout2d")
def dropout2d_after_batchnorm() -> Built:
    net = pooled(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3))
    return settled(net, 2 * images(32)), images()


@specimen(draws=1, note="Dropout2d, then BatchNorm: a norm in training mode would see the masks of all rows")
def dropout2d_before_batchnorm() -> Built:
    net = pooled(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.BatchNorm2d(8), nn.ReLU())
    return settled(net, 2 * images(32)), images()


@specimen(draws=2, note="a deep trunk without draws and a head with two dropouts, as in VGG")
def dropout_in_head() -> Built:
    trunk = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Dropout(0.5), nn.Linear(128, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)]
    return nn.Sequential(*trunk, nn.Flatten(), *head), images()


@specimen(draws=1, note="Dropout1d on (N, C, L)")
def dropout1d() -> Built:
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(64, 3))
    return net, torch.randn(ROWS, 2, 10)


@specimen(draws=1, note="Dropout1d on (N, F) takes the rows for channels and drops whole rows")
def dropout1d_on_rows() -> Built:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout1d(0.3), nn.Linear(16, 3)), torch.randn(ROWS, 8)


@specimen(draws=1, note="Dropout3d on (N, C, D, H, W)")
def dropout3d() -> Built:
    net = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Dropout3d(0.3), nn.Flatten(), nn.Linear(216, 3))
    return net, torch.randn(ROWS, 1, 5, 5, 5)


@specimen(draws=1, note="FeatureAlphaDropout on images, after SELU", mean_preserving=False)
def feature_alpha_dropout() -> Built:
    return pooled(nn.Conv2d(3, 8, 3), nn.SELU(), nn.FeatureAlphaDropout(0.3)), images()


@specimen(draws=1, note="F.dropout2d(training=self.training)")
def functional_dropout2d() -> Built:
    return FunctionalConv(), images()


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout2d(self.conv(x).relu(), 0.3, self.training).mean((2, 3)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """One step down and up again, with a skip connection round the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(11, 1, 1)
        self.norm, self.drop = nn.GroupNorm(2, 8), nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        low = F.interpolate(self.drop(self.norm(self.down(x)).relu()), scale_factor=2, mode="bilinear")
        up = self.up(F.max_pool2d(low, 2))
        return self.head(torch.cat([x, up], 1)).flatten(1)  # type: ignore[no-any-return]


@specimen(draws=1, note="a dense prediction: one output for each pixel")
def unet() -> Built:
    return UNet(), images()


class ShakeShake(nn.Module):
    """Two branches mixed by a random weight for each row (Gastaldi 2017); in eval by a half."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.rand(x.size(0), 1, 1, 1, device=x.device) if self.training else 0.5
        mixed = weight * self.left(x).relu() + (1 - weight) * self.right(x).relu()
        return self.head(mixed.mean((2, 3)))  # type: ignore[no-any-return]


@specimen(draws=1, note="shake-shake: a uniform weight for each row")
def shake_shake() -> Built:
    return ShakeShake(), images()


@specimen(
    draws=1,
    draws_in_eval=1,
    note="FractionalMaxPool2d draws the borders of its cells, in eval as well",
    refused="draws inside a function that hides them",
)
def fractional_pool() -> Built:
    return pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.FractionalMaxPool2d(2, output_size=4)), images(size=12)


@specimen(draws=1, note="BatchNorm, InstanceNorm with running statistics and SyncBatchNorm around one dropout")
def norms_with_statistics() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.SyncBatchNorm(8),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * 36, 3),
    )
    # a SyncBatchNorm in training mode refuses to run on a CPU, so it is left with the statistics it was born with
    return settled_but(nn.SyncBatchNorm, net, 2 * images(32)), images()


def settled_but(kind: type[nn.Module], net: nn.Sequential, inputs: Tensor) -> nn.Sequential:
    """Settles the layers that come before the first one of a kind."""
    first = next(i for i, layer in enumerate(net) if isinstance(layer, kind))
    settled(net[:first], inputs)
    return net
