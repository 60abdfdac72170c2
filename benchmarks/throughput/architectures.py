"""The six architectures of the throughput benchmark: what each is, in torch alone."""

import torch
from torch import Tensor, nn

__all__ = ["Block", "Read", "encoder", "head", "lecture", "recurrent", "residual", "wide"]


def lecture() -> nn.Module:
    """Two hidden layers of 100."""
    layers: list[nn.Module] = []
    for before in (784, 100):
        layers += [nn.Linear(before, 100), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def wide(width: int = 1024) -> nn.Module:
    """Three hidden layers of one width."""
    layers: list[nn.Module] = []
    for before in (784, width, width):
        layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def head() -> nn.Module:
    """Six convolutions, and dropout in the head alone."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(2048, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A residual block with spatial dropout between its convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        inner = [nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout2d(0.1)]
        self.branch = nn.Sequential(first, *inner, second, nn.BatchNorm2d(after))
        shortcut = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.shortcut = nn.Sequential(*shortcut) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to the shortcut."""
        out: Tensor = (self.shortcut(x) + self.branch(x)).relu()
        return out


def residual() -> nn.Module:
    """A ResNet-18 for small images, of width 16, whose norm layers have seen a few batches."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for before, after in ((16, 16), (16, 32), (32, 64), (64, 128)):
        layers += [Block(before, after, 1 if before == after else 2), Block(after, after, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        for _ in range(5):
            net(1.5 * torch.randn(32, 3, 32, 32) + 0.5)
    return net


class Read(nn.Module):
    """Reads a sequence (N, S, F), or the one that a recurrent layer gives first: its mean, or its last step."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor | tuple[Tensor, object]) -> Tensor:
        """Gives (N, F)."""
        steps = x if isinstance(x, Tensor) else x[0]
        return steps[:, -1] if self.last else steps.mean(dim=1)


def encoder() -> nn.Module:
    """Four layers of a transformer encoder."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, 0.1, batch_first=True)
    body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(body, Read(last=False), nn.Linear(256, 10))


def recurrent() -> nn.Module:
    """An LSTM of two layers."""
    body = nn.LSTM(64, 128, num_layers=2, dropout=0.3, batch_first=True)
    return nn.Sequential(body, Read(last=True), nn.Linear(128, 1))
