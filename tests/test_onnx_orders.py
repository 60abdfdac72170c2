"""Graphs whose draws have several entries for each row: which belong to whom is told, or they are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import ModelRefused
from mcdrop.quiet import quiet

X = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Drops in parts of its rows at once: steps first, or the first part of all rows before the others of each."""

    def __init__(self, offset: float, *, siamese: bool, p: float = 0.5) -> None:
        super().__init__()
        self.drop, self.offset, self.siamese = nn.Dropout(p), offset, siamese

    def forward(self, x: Tensor) -> Tensor:
        if self.siamese:
            dropped: Tensor = self.drop(torch.cat([x[:, 0], x[:, 1:].reshape(-1, 3)]))
            return dropped[: x.shape[0]] * dropped[x.shape[0] :].reshape(-1, 3, 3).sum(1)
        dropped = self.drop(x.transpose(0, 1).reshape(-1, 3))
        return dropped.reshape(4, -1, 3).sum(0) + self.offset


def exported(net: nn.Module, folder: Path) -> Any:
    path = str(folder / "net.onnx")
    with quiet():
        torch.onnx.export(
            net.train(), (X,), path, dynamo=False, training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False, input_names=["x"], dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return path


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_an_offset_does_not_hide_that_steps_come_first(offset: float, tmp_path: Path) -> None:
    """Of independent masks at a half the variance of a sum is the sum of the squares."""
    model = mcdrop.wrap(exported(Parts(offset, siamese=False), tmp_path), example=X.numpy())
    found = mcdrop.predict(model, X.numpy(), passes=2000, sampler="iid")
    np.testing.assert_allclose(found.variance, X.square().sum(1), rtol=5 * (2 / 2000) ** 0.5)


def test_a_rare_drop_does_not_hide_that_steps_come_first(tmp_path: Path) -> None:
    """A row alone has but one order."""
    model = mcdrop.wrap(exported(Parts(0.0, siamese=False, p=0.001), tmp_path), example=X.numpy())
    together = mcdrop.predict(model, X.numpy(), passes=500)
    assert (together.variance > 0).any()
    for row in range(len(X)):
        alone = mcdrop.predict(model, X[row : row + 1].numpy(), passes=500)
        np.testing.assert_allclose(alone.variance[0], together.variance[row], rtol=1e-4, atol=1e-9)


class Noisy(nn.Module):
    """Drops steps first, then adds to each step of each row noise whose variance has no end."""

    def __init__(self, *, cauchy: bool) -> None:
        super().__init__()
        self.drop, self.cauchy = nn.Dropout(), cauchy

    def forward(self, x: Tensor) -> Tensor:
        steps = self.drop(x.transpose(0, 1).reshape(-1, 3)).reshape(4, -1, 3).transpose(0, 1).reshape(-1, 3)
        u = torch.rand_like(steps)
        noise = torch.tan(torch.pi * (u - 0.5)) if self.cauchy else 1 / u
        added: Tensor = (steps + noise).reshape(-1, 4, 3).sum(1)
        return added


@pytest.mark.parametrize("cauchy", [True, False])
def test_noise_without_a_variance_does_not_hide_that_steps_come_first(cauchy: bool, tmp_path: Path) -> None:
    """A row answers alone as it does among others."""
    model = mcdrop.wrap(exported(Noisy(cauchy=cauchy), tmp_path), example=X.numpy())
    asked: dict[str, Any] = {"seed": 5, "start": 0, "sampler": "iid"}
    together = model.backend.forward(model.rows(X.numpy()), 20, **asked)
    for row in range(len(X)):
        alone = model.backend.forward(model.rows(X[row : row + 1].numpy()), 20, **asked)
        np.testing.assert_allclose(alone[:, 0], together[:, row], rtol=1e-5, atol=1e-5)


def test_a_graph_whose_entries_stand_in_no_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="belong to which row could not be told; wrap the torch network"):
        mcdrop.wrap(exported(Parts(0.0, siamese=True), tmp_path), example=X.numpy())
