"""The networks of the throughput benchmark: small to wide, with and without much before the first dropout."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS"]

Built = tuple[nn.Module, Callable[[int], Tensor]]


def lecture() -> Built:
    """M1: the lecture's two hidden layers of 100."""
    layers = [nn.Linear(1, 100), nn.Dropout(0.5), nn.ReLU(), nn.Linear(100, 100), nn.Dropout(0.2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 1)), lambda rows: torch.randn(rows, 1)


def wide() -> Built:
    """M2: two hidden layers of 1024."""
    layers = [nn.Linear(64, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), lambda rows: torch.randn(rows, 64)


def trunk() -> Built:
    """M3: convolutions, and dropout in the head alone."""
    convolutions: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        convolutions += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)]
    return nn.Sequential(*convolutions, *head), lambda rows: torch.randn(rows, 3, 32, 32)


class Block(nn.Module):
    """A residual block with spatial dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        middle = [nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.1)]
        self.branch = nn.Sequential(first, *middle, second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch."""
        out: Tensor = (x + self.branch(x)).relu()
        return out


def residual() -> Built:
    """M4: residual blocks with Dropout2d from the first on."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), *(Block(16) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10)), lambda rows: torch.randn(rows, 3, 32, 32)


class First(nn.Module):
    """Reads the first step of a sequence, or of what a recurrent layer gives."""

    def forward(self, x: Tensor | tuple[Tensor, object]) -> Tensor:
        """Gives (N, features)."""
        return (x if isinstance(x, Tensor) else x[0])[:, -1]


def encoder() -> Built:
    """M5: two layers of a transformer encoder."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(body, First(), nn.Linear(64, 10)), lambda rows: torch.randn(rows, 32, 64)


def recurrent() -> Built:
    """M6: an LSTM of two layers."""
    body = nn.LSTM(32, 64, num_layers=2, dropout=0.3, batch_first=True)
    return nn.Sequential(body, First(), nn.Linear(64, 1)), lambda rows: torch.randn(rows, 32, 32)


NETWORKS: dict[str, Callable[[], Built]] = {
    "M1 lecture": lecture,
    "M2 wide": wide,
    "M3 trunk": trunk,
    "M4 residual": residual,
    "M5 encoder": encoder,
    "M6 LSTM": recurrent,
}
