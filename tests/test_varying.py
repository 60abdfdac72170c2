"""Draws that differ from pass to pass: what is said of them, and that it works."""

import re
from ast import literal_eval

import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import UncontrolledDraw


class Routed(nn.Module):
    """Gives every row to the expert that a dropped layer scores highest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.score, self.out = nn.Dropout(0.5), nn.Linear(8, 2), nn.Linear(4, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.score(self.drop(x)).argmax(1)
        made = torch.zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            made[chosen == number] = expert(x[chosen == number])
        out: Tensor = self.out(made)
        return out


def test_draws_for_what_is_routed_by_other_draws_are_named_and_the_rest_is_live_without_them() -> None:
    x = torch.randn(8, 8)
    with pytest.raises(UncontrolledDraw, match="as where tokens are routed to experts") as caught:
        mcdrop.wrap(Routed(), example=x)
    paths = literal_eval(re.findall(r"exclude=(\[.*\])", str(caught.value))[0])
    assert paths == ["experts.0.1", "experts.1.1"]
    model = mcdrop.wrap(Routed(), example=x, exclude=paths)
    assert [site.path for site in model.audit.live] == ["drop"]
    assert (mcdrop.predict(model, x, passes=200).variance > 0).all()
