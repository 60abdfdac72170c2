"""Draws by which rows are compared or picked: with one mask for all rows they vanish, and they are named."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdrop.discover import discover
from mcdrop.errors import NoStochasticSite
from mcdrop.outputs import picker
from mcdrop.rows import Rows

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
Act = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Drops some, and then does what it is told in training; ``rate`` 0 leaves the first out."""

    def __init__(self, act: Act, rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.act, self.rate = nn.Linear(6, 8), nn.Linear(8, 2), act, rate

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = F.dropout(x, self.rate, self.training and self.rate > 0)
        return self.last(self.act(x) if self.training else x)  # type: ignore[no-any-return]


def centred_noise(x: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return x + noise - noise.mean(0)


def picked(x: Tensor) -> Tensor:
    """Adds something to half of the rows, twice as much: stochastic depth as DINOv2 has it."""
    half = torch.rand(len(x)).argsort()[: len(x) // 2]
    return x.index_add(0, half, x[half].sin(), alpha=2.0)


def differing(x: Tensor) -> Tensor:
    """The same noise for a row and the next but one."""
    noise = torch.rand_like(x)
    return x + noise - noise.roll(1, 0)


def normed(x: Tensor) -> Tensor:
    """Divides masks by how many are kept in the whole batch, as DropBlock does."""
    keep = (torch.rand_like(x) < 0.7).to(x.dtype)
    return x * keep * keep.numel() / keep.sum()


def said_of(net: nn.Module, x: Tensor = X) -> list[str]:
    """What a wrapped network is warned of that has to do with comparisons."""
    return [one for one in discover(net, Rows.of(x), picker(None)).audit.warnings if "compared with one another" in one]


@pytest.mark.parametrize("act", [centred_noise, picked, differing])
def test_a_draw_by_which_rows_are_compared_is_named(act: Act) -> None:
    said = said_of(Net(act))
    assert [one.split(":")[0] for one in said] == ["site1"]
    assert said_of(Net(act), X[:1]) == said  # a single row stands there several times


def test_alone_such_a_draw_is_no_live_one_and_the_cause_is_said() -> None:
    with pytest.raises(NoStochasticSite, match="picked, by this draw"):
        said_of(Net(picked, 0.0))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x * (torch.rand(len(x), 1) < 0.5),
        lambda x: x * torch.rand(8),
        normed,
        lambda x: F.dropout(x, 0.5) - F.dropout(x, 0.5).mean(0),
    ],
    ids=["noise", "rows", "shared", "normed", "centred"],
)
def test_other_draws_are_not_named(act: Act) -> None:
    """Rows that look at one another with masks that move them all the same are no cause."""
    assert not said_of(Net(act))
