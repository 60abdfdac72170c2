"""Networks of torchvision and timm: stochastic depth, DropBlock, and whole architectures made small."""

from typing import Any

import torch
from torch import Tensor, nn

from .specimen import ROWS, Built, library, settled, specimen

TORCHVISION = ("torchvision",)
TIMM = ("torchvision", "timm")


def images(rows: int = ROWS, size: int = 32) -> Tensor:
    return torch.randn(rows, 3, size, size)


class Residual(nn.Module):
    """A residual block whose branch is dropped."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.drop, self.head = nn.BatchNorm2d(8), drop, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.drop(self.norm(self.branch(x)))
        return self.head(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


def residual(drop: nn.Module) -> Built:
    return settled(Residual(drop), 2 * images(16, 8)), images(size=8)


def whole(net: Any, size: int = 32) -> Built:
    """A whole network with settled statistics, and images for it."""
    return settled(net, 2 * images(8, size)), images(size=size)


# Layers of torchvision.


@specimen(draws=1, note="StochasticDepth by row", requires=TORCHVISION)
def stochastic_depth() -> Built:
    return residual(library("torchvision.ops").StochasticDepth(0.3, "row"))


@specimen(draws=1, note="StochasticDepth for the whole batch: one number", requires=TORCHVISION)
def stochastic_depth_batch() -> Built:
    return residual(library("torchvision.ops").StochasticDepth(0.3, "batch"))


@specimen(draws=1, note="DropBlock2d rescales by what the whole batch kept", requires=TORCHVISION, row_coupled=True)
def drop_block() -> Built:
    return residual(library("torchvision.ops").DropBlock2d(0.3, 3))


# Architectures of torchvision.


@specimen(draws=4, note="functional dropout in every dense layer", requires=TORCHVISION)
def densenet() -> Built:
    return whole(library("torchvision.models").DenseNet(4, (2, 2), 8, drop_rate=0.2, num_classes=3))


@specimen(draws=4, note="3 stochastic depths and a dropout in the head", requires=TORCHVISION)
def efficientnet() -> Built:
    parts = library("torchvision.models.efficientnet")
    stages = ((1, 3, 1, 8, 12, 2), (4, 3, 2, 12, 16, 2), (4, 5, 2, 16, 24, 2))
    settings = [parts.MBConvConfig(*sizes, 1.0, 1.0) for sizes in stages]
    return whole(parts.EfficientNet(settings, 0.2, num_classes=3))


@specimen(draws=10, note="attention by hand, functional and module dropout, stochastic depth", requires=TORCHVISION)
def swin() -> Built:
    build = library("torchvision.models").SwinTransformer
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth_prob": 0.2}
    return build([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3, **rates), images()


@specimen(draws=9, note="encoder blocks around MultiheadAttention", requires=TORCHVISION)
def vision_transformer() -> Built:
    rates = {"dropout": 0.1, "attention_dropout": 0.1}
    net = library("torchvision.models").VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3, **rates)
    nn.init.normal_(net.heads.head.weight)  # born as zeros
    return net, images()


@specimen(draws=1, note="in training two more heads and a named tuple", requires=TORCHVISION, live=("dropout",))
def googlenet() -> Built:
    return whole(library("torchvision.models").googlenet(num_classes=3, aux_logits=True, init_weights=False), 64)


# timm.


@specimen(draws=1, note="DropPath", requires=TIMM)
def drop_path() -> Built:
    return residual(library("timm.layers").DropPath(0.3))


@specimen(draws=1, note="timm's DropBlock2d", requires=TIMM, row_coupled=True)
def timm_drop_block() -> Built:
    return residual(library("timm.layers").DropBlock2d(0.3, 3))


def _vit(**rates: float) -> nn.Module:
    net: nn.Module = library("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, **rates
    )
    nn.init.normal_(net.get_parameter("head.weight"))
    return net


RATES = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}


@specimen(draws=11, note="all rates of a vision transformer", requires=TIMM)
def timm_vit() -> Built:
    return _vit(**RATES), images()


@specimen(
    draws=12,
    note="PatchDropout: fewer tokens in training, chosen by sorting random numbers",
    requires=TIMM,
    mean_preserving=False,
)
def timm_vit_patch_drop() -> Built:
    return _vit(**RATES, patch_drop_rate=0.25), images()


@specimen(draws=4, note="DropPath and a dropout in the head", requires=TIMM)
def timm_convnext() -> Built:
    net = library("timm").create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3, drop_rate=0.2, drop_path_rate=0.2
    )
    for block in (m for m in net.modules() if hasattr(m, "gamma")):
        nn.init.ones_(block.gamma)  # born so small that a dropped branch is not seen
    nn.init.normal_(net.head.fc.weight)
    return net, images(size=64)
