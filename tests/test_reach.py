"""What the code of a network can reach, wherever it keeps it, without running any of it."""

import functools
import importlib
import itertools
import random
import sys
import threading
import tracemalloc
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from made import Skips
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

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


class OwnTensor(Tensor):
    pass


class Draws(nn.Linear):
    """Draws from a generator that its module has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(_GLOBAL.random())


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


def _with(one: Any, rng: Any) -> Any:
    one.rng = rng
    return one


def _made(rng: Any) -> nn.Module:
    """A layer that is made as in a notebook of settings, in a dict that says nothing of where it is."""
    made: dict[str, Any] = {"nn": nn, "rng": rng}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x * rng.random()", made)
    return made["Made"]()  # type: ignore[no-any-return]


def _wrapped(rng: Any) -> Callable[[], float]:
    """A function that says it is torch's, as one of a user around torch's does."""
    made: dict[str, Any] = {"functools": functools, "torch": torch, "rng": rng, "__name__": "mine"}
    exec("@functools.wraps(torch.nn.functional.relu)\ndef drawn():\n    return rng.random()", made)
    del made["drawn"].__wrapped__
    return made["drawn"]  # type: ignore[no-any-return]


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
    "a class of a class": lambda rng: Keeps(type("Meta", (type,), {"rng": rng})("Classy", (), {})),
    "a class that torch makes around it": lambda rng: weight_norm(type("Classy", (nn.Linear,), {"rng": rng})(4, 4)),
    "a class that torch's code makes": lambda rng: Keeps(
        type("Any", (), {"rng": rng, "__module__": "torch.nn", "__qualname__": "Module.f.<locals>.Any"})
    ),
    "a class in no module": _made,
    "a function that says it is torch's": lambda rng: Keeps(_wrapped(rng)),
    "torch's function around it": lambda rng: Keeps(torch.no_grad()(functools.partial(max, key=rng.random))),
    "an array of objects": lambda rng: Keeps(np.array([None, rng], dtype=object)),
    "an array of records": lambda rng: Keeps(np.array([(1, rng)], dtype=[("a", int), ("b", object)])),
    "a tensor": lambda rng: Keeps(_with(torch.ones(1), rng)),
    "a parameter": lambda rng: Keeps(_with(nn.Parameter(torch.ones(1)), rng)),
    "a tensor of another class": lambda rng: Keeps(_with(torch.ones(1).as_subclass(OwnTensor), rng)),
    "a module of Python": lambda rng: Keeps(_with(ModuleType("held"), rng)),
    "the last of many entries": lambda rng: Keeps([*([n] for n in range(5000)), rng]),
    "the last of many words": lambda rng: Keeps({**{str(n): n for n in range(5000)}, "rng": rng}),
    "a set": lambda rng: Keeps({rng.random}),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("rng", [np.random.default_rng(1), Own(1)], ids=["numpy", "a class of its own"])
def test_what_code_keeps_is_reached_wherever_it_is(make: Callable[[Any], nn.Module], rng: Any) -> None:
    assert any(one is rng for one in reached(nn.Sequential(make(rng)), KINDS).found)


@pytest.mark.parametrize(
    ("function", "kept"),
    [(_of_a_global, _GLOBAL), (_of_another_module, _ELSEWHERE.deep.rng), (weight_norm(Draws(4, 4)), _GLOBAL)],
)  # fmt: skip
def test_globals_that_code_names_are_reached(function: Any, kept: Any) -> None:
    assert [one is kept for one in reached(Keeps(function), KINDS).found] == [True]


def test_what_no_code_of_the_network_names_is_not_reached() -> None:
    assert reached(nn.Sequential(nn.Linear(4, 4), Keeps(_around(1.0)), nn.Dropout(0.5)), KINDS).found == []


def test_of_very_much_the_nearest_is_reached() -> None:
    rng = np.random.default_rng(3)
    net = Keeps([[[object() for _ in range(900)] for _ in range(900)], rng])
    assert [one is rng for one in reached(net, KINDS).found] == [True]


@pytest.mark.parametrize("blocks", [1, 1500])
def test_a_deep_layer_is_reached_in_any_network(blocks: int) -> None:
    rng = np.random.default_rng(4)
    inside = nn.Sequential(nn.Sequential(nn.Sequential(Keeps([[rng]]))))
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(blocks)), inside)
    _with(net, None).graph = {n: {m: {"weight": 1.0} for m in range(n, n + 50)} for n in range(1000)}
    found, whole = reached(net, KINDS)
    assert [one is rng for one in found] == [True]
    assert whole


def test_it_is_told_where_not_all_was_looked_at() -> None:
    rng = np.random.default_rng(5)
    found, whole = reached(nn.Sequential(Keeps([[n] for n in range(1_001_000)]), Keeps([[rng]])), KINDS)
    assert [one is rng for one in found] == [True]
    assert not whole


IMPORTS = {
    "global packages": "import reach_pkg.a.b\ndef f(): return reach_pkg.a.b.rng.random()",
    "a dotted import": "def f():\n import reach_pkg.a.b\n return reach_pkg.a.b.rng.random()",
    "a part of a dotted import": "def f():\n import reach_pkg.a.c\n return reach_pkg.a.b.rng.random()",
    "an import by another name": "def f():\n import reach_pkg.a.b as r\n return r.rng.random()",
    "an import of a name": "def f():\n from reach_pkg.a.b import rng as r\n return r.random()",
    "an import of a module": "def f():\n from reach_pkg.a import b\n return b.rng.random()",
    "a relative import": "def f():\n from .b import rng\n return rng.random()",
    "a relative import of a module": "def f():\n from . import b\n return b.rng.random()",
    "a relative import from further out": "def f():\n from ..a.b import rng\n return rng.random()",
    "an import in a function inside": "def f():\n def g():\n  from .b import rng\n  return rng.random()\n return g()",
    "a variable around a function": "def made():\n import reach_pkg.a.b as r\n return lambda: r.rng\nf = made()",
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("reach")
    files = {"__init__": "", "a/__init__": "", "a/b": "import random\nrng = random.Random(0)", "a/c": ""}
    for name, text in files.items():
        path = Path(folder, "reach_pkg", f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("reach_pkg.a.b")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reach_pkg"]:
        del sys.modules[name]


@pytest.mark.parametrize("text", IMPORTS.values(), ids=IMPORTS)
def test_what_functions_import_when_they_run_is_reached(text: str, imported: ModuleType) -> None:
    made: dict[str, Any] = {"__name__": "reach_pkg.a.nets", "__package__": "reach_pkg.a"}
    exec(text, made)
    assert [one is imported.rng for one in reached(Keeps(made["f"]), KINDS).found] == [True]


def test_large_containers_are_not_copied() -> None:
    many = 200_000
    net = Keeps([[None] * many, (None,) * many, dict.fromkeys(range(many)), deque([None] * many), {*range(many)}])
    tracemalloc.start()
    try:
        assert reached(net, KINDS) == ([], True)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def _more_and_less(held: Any) -> None:
    for number in range(-50, 0):
        held.append(number) if isinstance(held, deque) else held.update({number: None})
    for number in range(-50, 0):
        held.discard(number) if isinstance(held, set) else held.pop(*() if isinstance(held, deque) else (number,))


@pytest.mark.parametrize("kind", [dict.fromkeys, set, deque])
def test_what_changes_meanwhile_is_looked_at_all_the_same(kind: Callable[[Any], Any]) -> None:
    rng, stop, interval = np.random.default_rng(6), threading.Event(), sys.getswitchinterval()
    held = kind([*range(200_000), rng])

    def change() -> None:
        while not stop.is_set():
            _more_and_less(held)

    thread = threading.Thread(target=change)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        assert all(reached(Keeps(held), KINDS).found == [rng] for _ in range(5))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_no_code_of_classes_modules_or_layers_is_run() -> None:
    ran: list[str] = []

    class Asked(type):
        def __getattribute__(cls, name: str) -> Any:
            ran.append(name)
            raise RuntimeError("nobody asked")

        def __hash__(cls) -> int:
            ran.append("hash")
            raise RuntimeError("nobody asked")

        def __eq__(cls, other: object) -> bool:
            ran.append("eq")
            raise RuntimeError("nobody asked")

    class Layer(Keeps):
        def __getattribute__(self, name: str) -> Any:
            ran.append(name)
            return super().__getattribute__(name)

        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            ran.append("dict")
            return vars(nn.Module)["__dict__"].__get__(self)

    class Kept(metaclass=Asked):
        pass

    nameless = ModuleType("nameless")
    del nameless.__name__
    nameless.rng = rng = np.random.default_rng(7)  # type: ignore[attr-defined]
    net = Layer([Kept(), Kept, lambda: nameless.rng])
    ran.clear()
    assert reached(net, KINDS).found == [rng]
    assert ran == []


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
