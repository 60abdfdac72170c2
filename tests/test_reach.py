"""What the code of a network can reach, wherever it keeps it, without running any of it."""

import functools
import itertools
import random
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from made import Skips
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import UncontrolledDraw
from mcdrop.reach import reached

KINDS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Keeps(nn.Module):
    """Keeps something; what it does with it is the tests' business."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return x


class Slotted:
    __slots__ = ("rng",)

    def __init__(self, rng: Any) -> None:
        self.rng = rng


class Own(random.Random):
    pass


class Hostile:
    """Says of itself what is not so, and bears no question."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("nobody asked")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("nobody asked")

    def __len__(self) -> int:
        raise RuntimeError("nobody asked")


_GLOBAL = np.random.default_rng(0)
_ELSEWHERE = ModuleType("elsewhere")
_ELSEWHERE.deep = ModuleType("elsewhere.deep")  # type: ignore[attr-defined]
_ELSEWHERE.deep.rng = np.random.RandomState(0)


def _half() -> float:
    return 0.5


def _of_a_global(x: Tensor) -> Tensor:
    return x * float(_GLOBAL.random())


def _of_another_module(x: Tensor) -> Tensor:
    return x * float(_ELSEWHERE.deep.rng.random_sample())


def _hooked(rng: Any) -> nn.Module:
    net = nn.Linear(4, 4)
    net.register_forward_hook(lambda layer, given, out: out * rng.random())
    return net


def _around(rng: Any) -> Callable[[], float]:
    def inner() -> float:
        numbers: list[float] = [rng.random() for _ in range(1)]  # in code of its own
        return numbers[0]

    return inner


def _gives(rng: Any) -> Iterator[float]:
    while True:
        yield rng.random()


NETS: dict[str, Callable[[Any], nn.Module]] = {
    "an attribute": Keeps,
    "a method": lambda rng: Keeps(rng.random),
    "a list in a dict": lambda rng: Keeps({"a": [rng]}),
    "a deque": lambda rng: Keeps(deque([rng])),
    "a dict of another type": lambda rng: Keeps(UserDict(a=rng)),
    "slots": lambda rng: Keeps(Slotted(rng)),
    "a hostile object": lambda rng: Keeps([Hostile(rng)]),
    "a partial function": lambda rng: Keeps(functools.partial(max, key=rng.random)),
    "a variable around a function": lambda rng: Keeps(_around(rng)),
    "a default": lambda rng: Keeps(lambda x, rng=rng: x),
    "a cached function": lambda rng: Keeps(functools.lru_cache(lambda: rng.random())),
    "an iterator": lambda rng: Keeps(itertools.cycle(iter([rng.random]))),
    "a generator of Python": lambda rng: Keeps(_gives(rng)),
    "a hook of torch's layer": _hooked,
    "an activation of torch's layer": lambda rng: nn.TransformerEncoderLayer(
        4, 2, 8, activation=lambda x: x * float(rng.random()), batch_first=True
    ),
    "a class": lambda rng: type("Classy", (Keeps,), {"rng": rng})(),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("rng", [np.random.default_rng(1), Own(1)], ids=["numpy", "a class of its own"])
def test_what_code_keeps_is_reached_wherever_it_is(make: Callable[[Any], nn.Module], rng: Any) -> None:
    assert any(one is rng for one in reached(nn.Sequential(make(rng)), KINDS))


@pytest.mark.parametrize(
    ("function", "kept"), [(_of_a_global, _GLOBAL), (_of_another_module, _ELSEWHERE.deep.rng)]
)  # fmt: skip
def test_globals_that_code_names_are_reached(function: Any, kept: Any) -> None:
    assert [one is kept for one in reached(Keeps(function), KINDS)] == [True]


def test_what_no_code_of_the_network_names_is_not_reached() -> None:
    assert reached(nn.Sequential(nn.Linear(4, 4), Keeps(_around(1.0)), nn.Dropout(0.5)), KINDS) == []


def test_of_very_much_the_nearest_is_reached() -> None:
    rng = np.random.default_rng(3)
    net = Keeps([[[object() for _ in range(900)] for _ in range(900)], rng])
    assert [one is rng for one in reached(net, KINDS)] == [True]


def test_words_of_a_bit_generator_are_a_draw() -> None:
    bits = np.random.PCG64(0)
    net = nn.Sequential(Skips(lambda: bits.random_raw() * 2.0**-64), nn.Dropout(0.5)).eval()
    with pytest.raises(UncontrolledDraw, match=r"a numpy\.random\.PCG64 where '0' is in training mode"):
        mcdrop.wrap(net, example=X)


def test_what_is_half_made_or_replaced_keeps_no_network_from_being_wrapped() -> None:
    kept = [kind.__new__(kind) for kind in (np.random.RandomState, np.random.Generator, random.Random)]
    with mock.patch("random.random", new=_half), mock.patch("numpy.random.random_sample", new=_half):
        model = mcdrop.wrap(nn.Sequential(Keeps([*kept, random.SystemRandom()]), nn.Dropout(0.5)), example=X)
    assert model.audit.warnings == ()


def test_several_of_a_kind_are_told_apart() -> None:
    nets = [Skips(np.random.default_rng(seed).random) for seed in range(3)]
    nets[1] = Skips(lambda: 1.0)
    with pytest.raises(UncontrolledDraw) as caught:
        mcdrop.wrap(nn.Sequential(*nets, nn.Dropout(0.5)).eval(), example=X)
    assert "a numpy.random.Generator where '0' is in training mode" in str(caught.value)
    assert "a numpy.random.Generator (2) where '2' is in training mode" in str(caught.value)
    model = mcdrop.wrap(nn.Sequential(*nets, nn.Dropout(0.5)).eval(), example=X, exclude=["0", "2"])
    assert model.audit.warnings == ()
