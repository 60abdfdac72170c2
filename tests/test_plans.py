"""Plans of a network by input signature: whichever rows came first, an answer is the same."""

import pytest
import torch
from captures import passes
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import UncontrolledDraw


class There(nn.Module):
    """Drops those steps of all rows that are above -2."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_scatter(x > -2, self.drop(x[x > -2]))


WHOLE = torch.linspace(-1, 1, 24).reshape(8, 3, 1)
HOLES = WHOLE.index_put((torch.tensor([0, 5]), torch.tensor([1, 2])), torch.tensor(-3.0))


def test_rows_whose_draws_are_not_told_are_refused_where_those_of_the_example_are() -> None:
    model = mcdrop.wrap(There(), example=WHOLE[:, :2], tuning={})
    assert model.audit.warnings == ()
    with pytest.raises(UncontrolledDraw, match="'drop' follows these rows, unlike those of the example"):
        passes(model, HOLES, 4)
    passes(model, WHOLE, 4)


def test_answers_do_not_follow_what_was_asked_before_where_draws_are_not_told() -> None:
    requests, answers = [HOLES, WHOLE[:5], WHOLE, HOLES[:7]], []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        model = mcdrop.wrap(There(), example=HOLES[:, :2], tuning={})
        assert "no axis of its draw" in " ".join(model.audit.warnings)
        found = {number: passes(model, requests[number], 4) for number in [*order, *order]}
        answers.append(torch.cat([found[number] for number in range(4)], 1))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
