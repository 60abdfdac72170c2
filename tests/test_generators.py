"""Who draws from a global generator, and what is put back, whatever other threads draw meanwhile."""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import Skips
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, UncontrolledDraw
from mcdrop.generators import doubted, out_of_sight, own_generator

DRAWS: dict[str, Callable[[], float]] = {
    "Python's random": random.random,
    "numpy.random": np.random.rand,
    "torch's generator in another thread": lambda: float(torch.rand(1, dtype=torch.float64)),
}
SEEDS: dict[str, Callable[[int], object]] = {
    "Python's random": random.seed,
    "numpy.random": np.random.seed,
    "torch's generator in another thread": torch.manual_seed,
}
every = pytest.mark.parametrize("name", DRAWS)


@contextmanager
def drawing(draw: Callable[[], float], seconds: float) -> Iterator[list[float]]:
    """Lets another thread draw all the time, and gives what it has drawn."""
    seen: list[float] = []
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            seen.append(draw())
            time.sleep(seconds)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def named(act: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names the generators that a pass draws from, and those of which nobody knows."""

    def run() -> bool:
        act()
        return False

    with own_generator():
        return out_of_sight(run, run), doubted("Net")


@every
def test_who_draws_is_named_and_the_generator_put_back(name: str) -> None:
    SEEDS[name](3)
    first = DRAWS[name]()
    SEEDS[name](3)
    assert named(DRAWS[name]) == ([name], [])
    assert DRAWS[name]() == first


@every
def test_who_seeds_is_named_and_the_generator_put_back(name: str) -> None:
    """It stands in the same place after each pass, as one that nobody draws from does."""
    SEEDS[name](3)
    first = DRAWS[name]()
    SEEDS[name](3)
    assert named(lambda: SEEDS[name](5)) == ([name], [])
    assert DRAWS[name]() == first


@every
def test_one_draw_of_another_thread_is_not_the_networks_and_stays_drawn(name: str) -> None:
    SEEDS[name](3)
    expected = [DRAWS[name]() for _ in range(3)][1:]
    SEEDS[name](3)
    once = iter([DRAWS[name]])  # in the first pass alone, at the moment that another thread has it
    assert named(lambda: [draw() for draw in once]) == ([], [])
    assert [DRAWS[name]() for _ in range(2)] == expected


@every
@pytest.mark.parametrize("passes", [1, 100])
def test_of_a_pass_that_fails_what_it_draws_is_put_back_and_not_what_others_draw(name: str, passes: int) -> None:
    """Others draw in the first pass alone."""
    draws = iter([DRAWS[name]] * passes)

    def act() -> None:
        next(draws, float)()
        raise InputError("it fails")

    SEEDS[name](3)
    first, second = (DRAWS[name]() for _ in range(2))
    SEEDS[name](3)
    with pytest.raises(InputError):
        named(act)
    assert DRAWS[name]() == (second if passes == 1 else first)


@every
def test_who_draws_in_some_passes_and_stands_still_in_others_is_not_the_network(name: str) -> None:
    """It moves in a pass, not in the next one, and in the two after that: a network draws alike in all of them."""
    times = iter([1, 0, 1, 1, *[1] * 40])
    assert named(lambda: [DRAWS[name]() for _ in range(next(times))]) == ([], [])


@every
def test_what_another_thread_draws_all_the_time_is_never_named_and_never_drawn_twice(name: str) -> None:
    with drawing(DRAWS[name], 0.0005) as seen:
        time.sleep(0.002)
        assert named(lambda: time.sleep(0.005))[0] == []
        time.sleep(0.002)
    assert len(set(seen)) == len(seen) > 5


@every
def test_where_others_draw_in_every_pass_it_is_said_that_nobody_can_tell(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's generator it can be told, since operations of this thread are seen."""
    draw = DRAWS[name]
    monkeypatch.setattr(time, "sleep", lambda seconds: draw())  # as another thread does in each wait, and in each pass
    found, said = named(draw)
    assert found == []
    assert len(said) == ("torch" not in name)
    assert all(f"something else draws from {name}" in one for one in said)


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.one, self.drop, self.two, self.act = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.act(self.drop(self.one(x))))
        return out


def test_a_network_is_wrapped_while_another_thread_trains() -> None:
    """Its numbers are those of its seed, as without us, and all that it draws from is not the network's."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 4)
    expected = mcdrop.predict(mcdrop.wrap(net, example=x), x, passes=20, seed=1).mean
    torch.manual_seed(7)
    with drawing(DRAWS["torch's generator in another thread"], 0.001) as seen:
        model = mcdrop.wrap(net, example=x)
    np.testing.assert_array_equal(mcdrop.predict(model, x, passes=20, seed=1).mean, expected)
    assert len(model.audit.live) == 1
    torch.manual_seed(7)
    assert seen == [DRAWS["torch's generator in another thread"]() for _ in seen]


def test_a_network_that_draws_itself_is_refused_also_while_another_thread_draws() -> None:
    net = Net(lambda x: x * float(np.random.rand()))  # noqa: NPY002
    with (
        drawing(DRAWS["torch's generator in another thread"], 0.001),
        pytest.raises(UncontrolledDraw, match=r"numpy\.random in the root module") as caught,
    ):
        mcdrop.wrap(net, example=torch.ones(5, 4))
    assert "torch's generator" not in str(caught.value)


# -- those that code keeps for itself ----------------------------------------------------------------------------------


PRIVATE: dict[str, Callable[[], tuple[Any, Callable[[], float], Callable[[], Any]]]] = {
    "a numpy.random.Generator": lambda: (one := np.random.default_rng(3), one.random, lambda: one.bit_generator.state),
    "a numpy.random.RandomState": lambda: (one := np.random.RandomState(3), one.random_sample, one.tomaxint),
    "a random.Random": lambda: (one := random.Random(3), one.random, one.getstate),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_generator_that_code_keeps_for_itself_is_named_however_rarely_it_shows(kind: str) -> None:
    _, numbers, state = PRIVATE[kind]()
    _, _, fresh = PRIVATE[kind]()
    net = nn.Sequential(*(Skips(numbers) for _ in range(3)), nn.Dropout(0.5)).eval()
    with pytest.raises(UncontrolledDraw, match=f"{re.escape(kind)}.* where '0' or '1' or '2' is in training mode"):
        mcdrop.wrap(net, example=torch.ones(4, 4))
    assert state() == fresh()  # as it was before


def test_a_generator_of_its_own_that_another_thread_draws_from_all_the_time_is_not_the_networks() -> None:
    theirs, stop = np.random.default_rng(7), threading.Event()
    given = list[float]()

    def draw() -> None:
        while not stop.is_set():
            given.append(theirs.random())
            time.sleep(1e-5)

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        model = mcdrop.wrap(nn.Sequential(nn.Linear(4, 4), Custom()), example=torch.ones(4, 4))
    finally:
        stop.set()
        thread.join()
    assert model.audit.warnings == ()
    np.testing.assert_array_equal(given, np.random.default_rng(7).random(len(given)))  # each number once


def test_where_another_thread_draws_from_a_networks_own_generator_nobody_can_tell() -> None:
    shared, stop = np.random.default_rng(7), threading.Event()

    def draw() -> None:
        while not stop.is_set():
            shared.random()
            time.sleep(1e-5)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        with pytest.raises(
            UncontrolledDraw, match=r"something else draws from a numpy\.random\.Generator all the time"
        ):
            mcdrop.wrap(nn.Sequential(Skips(shared.random), nn.Dropout(0.5)).eval(), example=torch.ones(4, 4))
    finally:
        stop.set()
        thread.join()


def test_what_is_drawn_once_for_all_passes_is_no_draw_of_a_pass() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng, self.drawn = random.Random(5), list[float]()

        def forward(self, x: Tensor) -> Tensor:
            if not self.drawn:
                self.drawn.append(self.rng.random())
            return x

    model = mcdrop.wrap(nn.Sequential(Once(), nn.Dropout(0.5)), example=torch.ones(4, 4))
    assert [site.verdict for site in model.audit.sites] == ["live"]


@pytest.mark.parametrize(
    "numbers", [np.random.default_rng(3).random, np.random.rand], ids=["its own", "the global one"]
)
@pytest.mark.parametrize("rows", [torch.ones(3, 9, 4), torch.full((3, 5, 4), 9.0)], ids=["longer", "larger"])
def test_a_generator_that_later_rows_alone_reach_is_named_too(numbers: Callable[[], float], rows: Tensor) -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.block = nn.Dropout(0.3), Skips(numbers)

        def forward(self, x: Tensor) -> Tensor:
            far = x.shape[1] > 5 or bool((x > 5).any())
            out: Tensor = (self.block(self.drop(x)) if far else self.drop(x)).mean(1)
            return out

    model = mcdrop.wrap(Later().eval(), example=torch.ones(4, 4, 4))
    assert mcdrop.predict(model, torch.ones(3, 5, 4), passes=20).std.max() > 0
    with pytest.raises(UncontrolledDraw, match=r"a numpy\.random\.Generator|numpy\.random in"):
        mcdrop.predict(model, rows, passes=20)


class Lazy(nn.Module):
    """Makes its generator where there is none, at one of these places."""

    def __init__(self, seed: int | None, place: str, always: bool) -> None:
        super().__init__()
        self.seed, self.always, self.rngs = seed, always, dict[str, np.random.Generator]()
        self.holder: Any = vars(self) if place == "an attribute" else self.rngs

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.always:
            return x
        if "rng" not in self.holder:
            self.holder["rng"] = np.random.default_rng(self.seed)
        return x * torch.from_numpy(self.holder["rng"].random(4) > 0.3)


@pytest.mark.parametrize("place", ["an attribute", "a dict"])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("always", [False, True], ids=["in training", "always"])
def test_a_generator_that_a_forward_makes_where_there_is_none_is_named(
    seed: int | None, always: bool, place: str
) -> None:
    """Each pass would make it anew; with a seed all passes would draw the same."""
    with pytest.raises(UncontrolledDraw, match=r"a numpy\.random\.Generator (that a pass makes|where '1'|in the root)"):
        mcdrop.wrap(nn.Sequential(nn.Dropout(0.5), Lazy(seed, place, always)).eval(), example=torch.ones(4, 4))


def test_a_generator_that_makes_a_fixed_number_once_is_no_draw() -> None:
    class Fixed(nn.Module):
        rng: np.random.Generator | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.rng is None:
                self.rng = np.random.default_rng(0)
                self.scale = torch.from_numpy(self.rng.random(4)).to(x)
            return x * self.scale

    model = mcdrop.wrap(nn.Sequential(nn.Dropout(0.5), Fixed()).eval(), example=torch.ones(4, 4))
    assert [site.verdict for site in model.audit.sites] == ["live"]


def test_a_generator_of_a_module_that_a_forward_imports_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numbers_of_late.py").write_text("import random\nnumbers = random.Random(3)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def numbers() -> float:
        import numbers_of_late  # type: ignore[import-not-found]

        return float(numbers_of_late.numbers.random())

    with pytest.raises(UncontrolledDraw, match=r"a random\.Random where '0' is in training mode"):
        mcdrop.wrap(nn.Sequential(Skips(numbers), nn.Dropout(0.5)).eval(), example=torch.ones(4, 4))
