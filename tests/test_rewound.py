"""A state of torch's generator that a pass puts back: numbers come twice, where each draw has masks of its own."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcdrop.discover import Overrules, discover
from mcdrop.errors import UncontrolledDraw
from mcdrop.outputs import picker
from mcdrop.rows import Rows

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
Act = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Uses its dropout in some way."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.drop, self.last, self.act = nn.Dropout(0.3), nn.Linear(6, 2), act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.drop, x))  # type: ignore[no-any-return]


def warnings_of(act: Act, *, strict: bool = True) -> tuple[str, ...]:
    """What a wrapped network is warned of."""
    return discover(Net(act), Rows.of(X), picker(None), Overrules(strict=strict)).audit.warnings


def forked(drop: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        first = drop(x)
    return first + drop(x)  # type: ignore[no-any-return]


def put_back(drop: nn.Module, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    first = drop(x)
    torch.set_rng_state(state)
    return first + drop(x)  # type: ignore[no-any-return]


def always_the_same(drop: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn(6)
    return drop(x) + noise  # type: ignore[no-any-return]


def restored(drop: nn.Module, x: Tensor) -> Tensor:
    torch.default_generator.set_state(torch.default_generator.get_state())
    with torch.random.fork_rng(devices=[]):
        x = x + 1
    return drop(x)  # type: ignore[no-any-return]


def later(drop: nn.Module, x: Tensor) -> Tensor:
    x = drop(x)
    with torch.random.fork_rng(devices=[]):
        return x + 1


def several(drop: nn.Module, x: Tensor) -> Tensor:
    """Two forks without a draw, one inside of the other, between two draws."""
    with torch.random.fork_rng(devices=[]):
        x = x + 1
    x = drop(x)
    with torch.random.fork_rng(devices=[]), torch.random.fork_rng(devices=[]):
        x = x + 1
    return drop(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("act", [forked, put_back])
def test_torch_gives_one_mask_twice_where_a_state_is_put_back(act: Act) -> None:
    with torch.random.fork_rng(devices=[]):
        twice = act(nn.Dropout(0.3), torch.ones(64))
    assert len(twice.unique()) == 2  # of two masks also one kept unit


@pytest.mark.parametrize("act", [forked, put_back, always_the_same])
def test_a_network_that_puts_a_state_back_is_refused_with_the_cause(act: Act) -> None:
    with pytest.raises(UncontrolledDraw, match="state of torch's generator is put back"):
        warnings_of(act)
    assert [one for one in warnings_of(act, strict=False) if "is put back" in one]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant checkpoint
@pytest.mark.parametrize(
    "act",
    [
        restored,
        later,
        several,
        lambda drop, x: checkpoint(drop, x, use_reentrant=False),
        lambda drop, x: checkpoint(drop, x, use_reentrant=True),
    ],
    ids=["before the draw", "after the draw", "several", "checkpoint", "reentrant checkpoint"],
)
def test_a_state_that_stands_where_it_stood_is_no_cause(act: Act) -> None:
    assert warnings_of(act) == ()


def test_no_hook_is_left_and_that_of_others_stays() -> None:
    warnings_of(forked, strict=False)
    assert sys.getprofile() is None

    def profiled(*ignored: object) -> None:
        """Looks at nothing."""

    sys.setprofile(profiled)
    try:
        warnings_of(later)
        assert sys.getprofile() is profiled
    finally:
        sys.setprofile(None)
