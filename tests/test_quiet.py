"""What is silenced is silenced for one thread, and tracing by several threads at once leaves nothing behind."""

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mcdrop
from mcdrop.quiet import quiet


def elsewhere(work: Callable[[], object]) -> None:
    """Does something in another thread."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_only_this_thread_is_silenced_and_only_up_to_the_level(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("mcdrop.test")
    with quiet():
        log.warning("hidden")
        log.error("an error")
        elsewhere(lambda: log.warning("of another thread"))
    log.warning("afterwards")
    assert caplog.messages == ["an error", "of another thread", "afterwards"]


def test_two_threads_in_it_leave_the_filters_of_warnings_as_they_were() -> None:
    before, inside, second, left = list(warnings.filters), *(threading.Event() for _ in range(3))

    def one() -> None:
        with quiet():
            inside.set()
            second.wait(0.2)  # the other one comes in meanwhile, or waits for its turn
        left.set()

    def two() -> None:
        inside.wait(5)
        with quiet():
            second.set()
            left.wait(0.2)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(one), pool.submit(two)]:
            done.result()
    assert warnings.filters == before


def test_networks_wrapped_by_several_threads_leave_torch_as_it_was() -> None:
    """torch notes in one variable of the process that it traces, and refuses to compile as long as it says so."""

    nets = [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in range(12)]
    with ThreadPoolExecutor(8) as pool:
        tiers = pool.map(lambda net: mcdrop.wrap(net, example=torch.ones(4, 4)).audit.tier, nets)
        assert set(tiers) == {"captured"}
    assert not torch.fx._symbolic_trace.is_fx_tracing()
