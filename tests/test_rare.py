"""Draws that hardly a pass shows are found, told and proved as those are that every pass shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import ModelRefused, UncontrolledDraw

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Acts(nn.Module):
    """Two layers, and something between them in training mode."""

    def __init__(self, act: Callable[[Tensor], Tensor], *, width: int = 8, drop: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.act = nn.Linear(4, width), nn.Linear(width, 2), act
        self.drop = nn.Dropout(0.3) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.first(x)))
        out: Tensor = self.last(self.act(h) if self.training else h)
        return out


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda h: h * (torch.rand_like(h) > 1e-3),
    "normal": lambda h: h * (torch.randn_like(h) < 3.1),
    "dropout": lambda h: F.dropout(h, 1e-3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_rare_mask_is_live_alone_and_beside_others_and_in_a_saved_model(
    mask: Callable[[Tensor], Tensor], format: str, tmp_path: Path
) -> None:
    alone = mcdrop.wrap(Acts(mask, width=16, drop=False).eval(), example=X)
    assert [site.verdict for site in alone.audit.sites] == ["live"]
    model = mcdrop.wrap(Acts(mask).eval(), example=X)
    assert [site.verdict for site in model.audit.sites] == ["live", "live"]
    saved = mcdrop.load(mcdrop.save(model, tmp_path / "rare", format=format))
    one, other = (mcdrop.predict(each, X, passes=50) for each in (model, saved))
    np.testing.assert_allclose(other.mean, one.mean, atol=1e-6)
    np.testing.assert_allclose(other.variance, one.variance, atol=1e-6)


FLAGS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda h: h * (torch.rand_like(h) > 3e-3),
    "truths": lambda h: h.masked_fill(F.dropout(torch.ones_like(h), 3e-3) == 0, 0.0),
}


@pytest.mark.parametrize("mask", FLAGS.values(), ids=FLAGS)
def test_entries_of_a_row_stand_where_they_are_for_rare_masks_too(mask: Callable[[Tensor], Tensor]) -> None:
    """A network that looks at three views of each row: the views come before the rows."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(torch.tanh(self.first(x)), 0.3, self.training).repeat(3, 1)
            h = mask(h) if self.training else h
            out: Tensor = self.last(h).view(3, -1, 1).mean(0)
            return out

    model = mcdrop.wrap(Views().eval(), example=X)
    among = mcdrop.predict(model, X, passes=300)
    for row in (1, 4):
        single = mcdrop.predict(model, X[row : row + 1], passes=300)
        np.testing.assert_allclose(single.mean[0], among.mean[row], atol=1e-6)
        np.testing.assert_allclose(single.variance[0], among.variance[row], atol=1e-6)


@pytest.mark.parametrize("p", [0.3, 3e-3])
def test_rows_that_are_now_and_then_mixed_are_named(p: float) -> None:
    def mixed(h: Tensor) -> Tensor:
        return torch.where(torch.rand(len(h), 1) < p, h.flip(0) * 3, h)

    warnings = mcdrop.wrap(Acts(mixed).eval(), example=X).audit.warnings
    assert any("a row's answer depends on its batch" in one for one in warnings)


HIDDEN: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "an order": lambda: float(torch.randperm(5)[0]),
}


@pytest.mark.parametrize("draw", HIDDEN.values(), ids=HIDDEN)
def test_what_draws_out_of_sight_now_and_then_is_refused(draw: Callable[[], Any]) -> None:
    def gated(h: Tensor) -> Tensor:
        return h * draw() if torch.rand(()) < 0.01 else h

    with pytest.raises(UncontrolledDraw, match=r"numpy\.random|randperm"):
        mcdrop.wrap(Acts(gated).eval(), example=X)


def test_what_goes_on_from_its_last_pass_now_and_then_is_refused() -> None:
    seen: list[float] = []

    def gated(h: Tensor) -> Tensor:
        if torch.rand(()) < 0.01:
            seen.append(1.0)
        return h * (1 + len(seen))

    with pytest.raises(UncontrolledDraw, match=r"gives other numbers at each call"):
        mcdrop.wrap(Acts(gated).eval(), example=X)


@pytest.mark.parametrize("parameter", [True, False], ids=["a parameter", "a buffer"])
def test_what_a_forward_sets_by_data_is_as_it_was(parameter: bool) -> None:
    """DropConnect that overwrites its weights: the user's network keeps them, whatever is said of it."""

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            weight = torch.randn(2, 4)
            if parameter:
                self.weight = nn.Parameter(weight)
            else:
                self.register_buffer("weight", weight)
            self.drop = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.weight.data = self.weight.data.masked_fill(torch.rand(2, 4) < 0.2, 0.0)
            return F.linear(self.drop(x), self.weight)

    net = Sets().eval()
    before = net.weight.detach().clone()
    with pytest.raises(UncontrolledDraw, match="writes to weight in training mode"):
        mcdrop.wrap(net, example=X)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("always", [False, True])
def test_a_weight_whose_numbers_are_others_for_a_while_is_refused_by_name(always: bool) -> None:
    """A pass that fails in between would leave masked ones in the user's network; another thread would see them."""

    class Swaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.first.weight.data
            if always or self.training:
                self.first.weight.data = F.dropout(weight, 0.3, self.training)
            out: Tensor = self.last(self.first(x).relu())
            self.first.weight.data = weight
            return out

    net = Swaps().eval()
    before = net.first.weight.detach().clone()
    with pytest.raises(ModelRefused, match=r"writes to .*first\.weight in"):
        mcdrop.wrap(net, example=X)
    assert torch.equal(net.first.weight, before)


def test_a_weight_that_is_set_to_what_it_is_stays_allowed() -> None:
    """As by a forward that moves its weights to where the rows are."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.last.weight.data = self.last.weight.data.to(x.device)
            out: Tensor = self.last(self.drop(x))
            return out

    assert [site.verdict for site in mcdrop.wrap(Moves().eval(), example=X).audit.sites] == ["live"]


def test_a_forward_that_draws_until_a_number_is_low_is_told_what_works() -> None:
    """Where all numbers are high it would go on for ever."""

    class Until(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            while self.training and torch.rand(()) > 0.9:
                pass
            out: Tensor = self.drop(x)
            return out

    with pytest.raises(UncontrolledDraw, match="takes another way"):
        mcdrop.wrap(Until().eval(), example=X)
