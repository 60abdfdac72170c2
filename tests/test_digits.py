"""The switch for tf32: as it is asked for while somebody computes, and as it was afterwards."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mcdrop.digits import digits

CUDA = torch.device("cuda")  # a name: the switch is there without a device


@pytest.fixture(autouse=True, params=[False, True])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    was = now()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param, True
    yield now()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was


def now() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_the_switch_is_put_back(tf32: bool, before: tuple[bool, bool]) -> None:
    with digits(CUDA, tf32=tf32):
        with digits(CUDA, tf32=tf32):
            assert now() == (tf32, tf32)
        assert now() == (tf32, tf32)
    assert now() == before
    with pytest.raises(ValueError, match="inside"), digits(CUDA, tf32=tf32):
        raise ValueError("inside")
    assert now() == before


def test_a_cpu_has_no_switch(before: tuple[bool, bool]) -> None:
    with digits(torch.device("cpu"), tf32=not before[0]):
        assert now() == before


def test_those_who_agree_go_together_and_others_wait(before: tuple[bool, bool]) -> None:
    together = threading.Barrier(3)
    wrong: list[tuple[bool, bool]] = []

    def compute(tf32: bool, meet: threading.Barrier | None) -> None:
        for _ in range(20):
            with digits(CUDA, tf32=tf32):
                if meet is not None:
                    meet.wait(timeout=30)
                    meet = None
                time.sleep(0.0005)
                if now() != (tf32, tf32):
                    wrong.append(now())

    threads = [threading.Thread(target=compute, args=(False, together)) for _ in range(3)]
    threads += [threading.Thread(target=compute, args=(True, None)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert not together.broken
    assert wrong == []
    assert now() == before


def test_the_newer_switches_are_put_back_too(before: tuple[bool, bool]) -> None:
    """``fp32_precision`` set by somebody else: then torch refuses to say how the older ones stand."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    was = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    for chosen in (("tf32", "ieee", "ieee"), ("ieee", "tf32", "ieee"), ("tf32", "tf32", "ieee")):
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = chosen
        for tf32 in (False, True):
            with digits(CUDA, tf32=tf32):
                assert now() == (tf32, tf32)
                assert (matmul.fp32_precision == "tf32") == tf32
            assert (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == chosen
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = was
