"""The order of sums is told from what is drawn out of sight."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mcdrop.one_order import apart, repeats

ROWS = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
CELLS = torch.arange(256) % 2
CALLS = itertools.count()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With which torch's own sum below hardly ever gives the same twice."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def summed() -> Tensor:
    return torch.zeros(2, 1024).index_put((CELLS,), ROWS, accumulate=True)


def drawn() -> Tensor:
    """The same with a draw out of sight, which is not larger than what the order of a sum does."""
    return summed() * (1 + 1e-6 * (1 + next(CALLS) % 5))


def listed(output: Tensor) -> list[Tensor]:
    return [output]


def test_the_order_of_a_sum_is_no_difference() -> None:
    for _ in range(20):
        assert not apart(summed(), summed(), (summed, summed), listed)
        assert repeats(summed(), summed, listed, looks=2)


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_another_number_is_one(size: float) -> None:
    def other() -> Tensor:
        return summed() * (1 + size)

    assert apart(summed(), other(), (summed, other), listed)
    assert apart(other(), summed(), (other, summed), listed)


def test_what_is_drawn_out_of_sight_is_no_order() -> None:
    for _ in range(5):
        assert not repeats(drawn(), drawn, listed, looks=2)
        assert apart(drawn(), summed(), (drawn, summed), listed)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("warns", [False, True])
def test_the_switch_stands_as_before(enabled: bool, warns: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(enabled, warn_only=warns)
    try:
        assert apart(summed(), summed() * (1 + 1e-6), (summed, lambda: 2 * summed()), listed)
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


def test_what_is_set_meanwhile_stays() -> None:
    """As by another thread; here by the computation itself."""

    def setting() -> Tensor:
        torch.use_deterministic_algorithms(True)
        return 2 * summed()

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        assert apart(summed(), summed() * (1 + 1e-6), (summed, setting), listed)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
