"""Small networks that a model folder can name as its factory, and folders made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mcdrop

X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)


def plain(width: int = 6, outputs: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.4), nn.ReLU(), nn.Linear(width, outputs)
    )


class Tied(nn.Module):
    """One matrix there and back, as in language models, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.back.weight = self.there.weight
        self.again, self.dropout = self.there, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.back(self.dropout(self.there(x))))
        return out


class Computed(nn.Module):
    """Holds tensors that no weights file does, and computes with tensors while it is built."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        rates = [float(rate) for rate in torch.linspace(0.1, 0.3, 2)]
        self.drops = nn.ModuleList([nn.Dropout(rate) for rate in rates])
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.shift = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for drop in self.drops:
            x = drop(x)
        out: Tensor = self.linear(x * self.table + self.shift)
        return out


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.dropout = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Dropout(0.3)

    def forward(self, values: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.linear(values) + self.embed(ids).mean(dim=1))
        return out


MEANWHILE: list[Callable[[], object]] = []  # what happens once, while a network runs


class Slow(nn.Module):
    """While it is wrapped, something else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        while MEANWHILE:
            MEANWHILE.pop()()
        out: Tensor = self.net(x)
        return out


class Named(nn.Module):
    """Takes inputs by name, in an order that is not that of the letters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout, self.linear = nn.Embedding(9, 4), nn.Dropout(0.3), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.dropout(self.embed(input_ids)) * attention_mask[..., None]
        out: Tensor = self.linear(h.mean(1))
        return out


def backboned(weights_backbone: str | None = "from the net", *, weights: str | None = None) -> nn.Module:
    """As torchvision's detectors, whose backbone is fetched unless one says None."""
    if weights_backbone is not None or weights is not None:
        raise ConnectionError("weights would be fetched")
    return plain()


def not_a_network() -> str:
    return "hello"


IDS = np.arange(60).reshape(30, 2) % 9
FACTORIES: dict[str, tuple[Any, Any]] = {
    "plain": (plain, X),
    "Tied": (Tied, X),
    "Computed": (Computed, X),
    "Two": (Two, (X, IDS)),
}


def trained(make: Any, example: Any, **options: Any) -> mcdrop.Model:
    """A model whose weights and running statistics are not those of any fresh network."""
    torch.manual_seed(3)
    net = make()
    rows = example if isinstance(example, tuple) else (example,)
    for _ in range(3):
        net.train()(*(torch.from_numpy(leaf) for leaf in rows))
    return mcdrop.wrap(net.eval(), example=example, **options)


def saved(folder: Path, name: str = "plain", **options: Any) -> tuple[mcdrop.Model, Path]:
    make, example = FACTORIES[name]
    model = trained(make, example)
    return model, mcdrop.save(model, folder / "net" / "1", factory=f"factories:{name}", **options)


def stops() -> nn.Module:
    raise KeyboardInterrupt
