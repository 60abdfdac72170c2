"""Draws of several entries for each row, which stand apart: the first ones of all rows before their second ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop

STEPS, UNITS, RATE = 5, 8, 0.4


class StepsFirst(nn.Module):
    """Rows of all steps one after another, dropped, weighed and added up."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(UNITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = F.dropout(x.transpose(0, 1).reshape(-1, UNITS), RATE, self.training)
        return self.head(steps).reshape(STEPS, -1, 1).sum(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", ["module", "pt2", "onnx"])
def test_the_variance_of_dropped_steps_is_that_of_independent_masks(format: str, tmp_path: Path) -> None:
    """The variance of a sum of independent terms: p / (1 - p) times the squares of what each adds.

    Ten rows are a multiple of the five steps, so that taken side by side all steps of a row had one mask. The standard
    error of a variance of 4,000 passes is 2.2 %; four of these.
    """
    torch.manual_seed(0)
    net, x = StepsFirst().eval(), torch.randn(10, STEPS, UNITS)
    model = mcdrop.wrap(net, example=x[:4])
    if format != "module":
        model = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format=format))
    assert model.audit.warnings == ()
    result = mcdrop.sample(model, x.numpy(), mcdrop.PassPlan(4000, 0, sampler="iid"))
    terms = (x * net.head.weight.detach()[0]).double()
    expected = RATE / (1 - RATE) * terms.square().sum((1, 2)).numpy()
    assert np.abs(result.variance[:, 0] / expected - 1).max() < 4 * np.sqrt(2 / 4000)
    alone = mcdrop.sample(model, x[3:4].numpy(), mcdrop.PassPlan(100, 0))
    among = mcdrop.sample(model, x.numpy(), mcdrop.PassPlan(100, 0))
    assert np.abs(alone.mean[0] - among.mean[3]).max() < 1e-5


class Copies(nn.Module):
    """Averages over copies of the rows: side by side, all copies of a row had one mask for some numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(UNITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        copies = F.dropout(x.repeat(STEPS, 1), RATE, self.training)
        return self.head(copies).reshape(STEPS, -1, 1).mean(0)  # type: ignore[no-any-return]


class Apart(nn.Module):
    """How far two copies of a row are apart: 0 in all rows where both have one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(UNITS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.dropout(x.repeat(2, 1), RATE, self.training).chunk(2)
        return self.head(one - other)  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", ["module", "onnx"])
def test_the_variance_between_copies_is_that_of_independent_masks(format: str, tmp_path: Path) -> None:
    """Twice that of one; four standard errors, as above."""
    torch.manual_seed(0)
    net, x = Apart().eval(), torch.randn(10, UNITS)
    model = mcdrop.wrap(net, example=x[:4])
    if format != "module":
        model = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format=format))
    assert model.audit.warnings == ()
    result = mcdrop.sample(model, x.numpy(), mcdrop.PassPlan(4000, 0, sampler="iid"))
    expected = 2 * RATE / (1 - RATE) * (x * net.head.weight.detach()[0]).double().square().sum(1).numpy()
    assert np.abs(result.variance[:, 0] / expected - 1).max() < 4 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("format", ["module", "onnx"])
def test_the_variance_of_averaged_copies_is_that_of_independent_masks(format: str, tmp_path: Path) -> None:
    """That of one copy over their number; four standard errors, as above."""
    torch.manual_seed(0)
    net, x = Copies().eval(), torch.randn(10, UNITS)
    model = mcdrop.wrap(net, example=x[:4])
    if format != "module":
        model = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format=format))
    assert model.audit.warnings == ()
    result = mcdrop.sample(model, x.numpy(), mcdrop.PassPlan(4000, 0, sampler="iid"))
    expected = RATE / (1 - RATE) * (x * net.head.weight.detach()[0]).double().square().sum(1).numpy() / STEPS
    assert np.abs(result.variance[:, 0] / expected - 1).max() < 4 * np.sqrt(2 / 4000)
