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

    def __init__(self, offset: float, *, siamese: bool) -> None:
        super().__init__()
        self.drop, self.offset, self.siamese = nn.Dropout(0.5), offset, siamese

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


def test_a_graph_whose_entries_stand_in_no_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="belong to which row could not be told; wrap the torch network"):
        mcdrop.wrap(exported(Parts(0.0, siamese=True), tmp_path), example=X.numpy())
