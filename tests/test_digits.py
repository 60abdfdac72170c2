"""The switch for tf32: as it is asked for while somebody computes, and as it was afterwards."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcdrop.digits import digits

CUDA = torch.device("cuda")  # a name: the switch is there without a device


@pytest.fixture(params=[False, True])
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


def everything() -> list[Any]:
    """All that torch says of its switches; None where it refuses to say."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    found: list[Any] = [matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    for ask in (lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(ask())
        except RuntimeError:
            found.append(None)
    return found


# What somebody may have set. Not all of it can be taken back: each is set in a process of its own.
SET = {
    "nothing": "pass",
    "a word": "torch.set_float32_matmul_precision('medium')",
    "another word": "torch.set_float32_matmul_precision('high')",
    "an older switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "newer ones": "matmul.fp32_precision = cudnn.conv.fp32_precision = 'tf32'; cudnn.rnn.fp32_precision = 'ieee'",
    "one of them": "cudnn.conv.fp32_precision = 'ieee'",
    "the one above convolutions": "cudnn.fp32_precision = 'tf32'",
    "the one above all": "torch.backends.fp32_precision = 'tf32'",
}
SCRIPT = """
import os
import sys
sys.path.insert(0, "tests")
import torch
from test_digits import CUDA, SET, digits, everything
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

def check(setting):
    exec(setting)
    before = everything()
    for tf32 in (False, True, False):
        with digits(CUDA, tf32=tf32):
            assert everything()[:3] == ["tf32" if tf32 else "ieee"] * 3, everything()
        assert everything() == before, (before, everything())

for what, setting in SET.items():
    child = os.fork()
    if not child:
        check(setting)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, what
"""


def test_whatever_was_set_holds_afterwards_and_not_inside() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_other_mode_inside_of_one_is_an_error_instead_of_waiting_for_ever(before: tuple[bool, bool]) -> None:
    with digits(CUDA), pytest.raises(RuntimeError, match="cannot run inside of one another"), digits(CUDA, tf32=True):
        pass
    assert now() == before
