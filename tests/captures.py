"""Small networks of many kinds that can be captured, and what tests of captured passes ask of them."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mcdrop
from mcdrop.backends.torch import TorchBackend
from mcdrop.program import Program, Values
from mcdrop.rows import Rows

__all__ = [
    "NETS",
    "Operations",
    "apart",
    "backend_of",
    "loop",
    "made",
    "passes",
    "program_of",
    "stacks_of",
    "tensors",
    "wrapped",
]


class Residual(nn.Module):
    """Convolutions with batch norm, a way around them, and dropped channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 1)
        )
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = torch.relu(self.norm(self.body(h)) + h)
        out: Tensor = self.head(h.mean((2, 3)))
        return out


class Dense(nn.Module):
    """Each layer reads what all before it gave, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(9, 5), nn.Linear(14, 2)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x, self.dropout(torch.relu(self.one(x)))], dim=1)
        h = torch.cat([torch.relu(self.two(h)), h], dim=-1)
        out: Tensor = self.head(h)
        return out


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between them, read at the last step."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.body, self.head = kind(3, 5, num_layers=2, dropout=0.4, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)[0][:, -1])
        return out


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Dropout(0.4), nn.ReLU(), nn.Linear(20, 20), nn.AlphaDropout(0.2),
        nn.Linear(20, 2),
    )  # fmt: skip


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU(), nn.Conv1d(4, 4, 3, stride=2),
        nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.Dropout3d(0.4), nn.ReLU(), nn.Conv3d(3, 2, 2), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip


def _pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1, groups=1),
        nn.Dropout2d(0.3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (4,)),
    "residual": (Residual, (2, 6, 6)),
    "encoder": (_encoder, (5, 8)),
    "lstm": (partial(Recurrent, nn.LSTM), (6, 3)),
    "gru": (partial(Recurrent, nn.GRU), (6, 3)),
    "dense": (Dense, (4,)),
    "conv1d": (_conv1d, (2, 9)),
    "conv3d": (_conv3d, (1, 4, 4, 4)),
    "pools": (_pools, (1, 8, 8)),
}


def made(name: str, device: str = "cpu", rows: int = 64) -> tuple[nn.Module, Tensor]:
    """Gives a network in eval whose running statistics are those of other rows, and rows for it."""
    make, shape = NETS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        net, others, x = make().eval(), torch.randn(50, *shape), torch.randn(rows, *shape)
        norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        net(others)
    return net.eval().to(device), x.to(device)


@cache
def wrapped(name: str, device: str = "cpu") -> tuple[mcdrop.Model, Tensor]:
    """Gives a model and rows, the same ones to every test; nobody changes its weights."""
    net, x = made(name, device)
    return mcdrop.wrap(net, example=x[:4]), x


def backend_of(model: mcdrop.Model) -> TorchBackend:
    """Gives the backend of a torch model."""
    assert isinstance(model.backend, TorchBackend)
    return model.backend


def stacks_of(model: mcdrop.Model, x: Tensor, count: int) -> list[Tensor]:
    """Gives masks (T, ...) of each draw, kept or dropped."""
    sites = backend_of(model).plans.prepare(model.rows(x))[0].on
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(count, *site.shape, generator=generator) > 0.4).to(x.device) for site in sites]


def program_of(model: mcdrop.Model, x: Tensor) -> tuple[Program, Rows]:
    """Gives the captured program of rows like these, and the rows as the program takes them."""
    plan, placed = backend_of(model).plans.prepare(model.rows(x))
    assert plan.program is not None, plan.reason
    return plan.program, placed


def passes(model: mcdrop.Model, x: Any, count: int) -> Tensor:
    """Gives passes as the engine gets them, (T, N, ...)."""
    return torch.from_numpy(model.backend.forward(model.rows(x), count, seed=0, start=0, sampler="iid"))


def loop(model: mcdrop.Model, x: Any, count: int) -> Tensor:
    """Gives the same passes one by one, by the network's own code."""
    return backend_of(model).run(model.rows(x), count, only=None, tier="loop").cpu().float()


def apart(left: Any, right: Any) -> float:
    """The largest difference of two arrays, as a part of the largest value."""
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def tensors(values: Values) -> list[Tensor]:
    """Gives the tensors among what a stage gave; weights that were packed for oneDNN in torch's own order."""
    return [value.to_dense() if value.is_mkldnn else value for value in values if isinstance(value, Tensor)]


class Operations(TorchDispatchMode):
    """Notes what torch runs while it is active: the name of each operation, and its tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append((str(func), args))
        return func(*args, **(kwargs or {}))

    def named(self, part: str) -> list[tuple[Any, ...]]:
        """Gives the arguments of the operations whose name holds a part."""
        return [args for name, args in self.seen if part in name]
