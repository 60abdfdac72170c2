"""A row's answer is its own: alone, in any company and order, in chunks, in threads; a longer row extends its masks."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, MCDropError

from . import ROWS, ZOO, Example
from .awkward import TwoLayers
from .wrapped import CONTROLLED, Wrapped, built, passes, plain, same, taken, tolerance, wrapped

every = pytest.mark.parametrize("name", CONTROLLED)

Array = NDArray[np.float64]


def check(made: Wrapped, together: Array, which: list[int]) -> None:
    """Compares chosen rows with what they were in the batch; the audit must say so where they differ, or fail."""
    try:
        equal = same(passes(made, taken(made.example, which), 6), together[:, which], tolerance(made.module))
    except MCDropError:
        equal = False
    assert equal or made.says_coupled, f"{made.specimen.name} hides that its rows depend on one another"


@every
def test_only_networks_that_couple_their_rows_are_said_to(name: str) -> None:
    assert ZOO[name].row_coupled or not wrapped(name).says_coupled


@every
def test_a_row_alone_is_the_row_in_the_batch(name: str) -> None:
    made = wrapped(name)
    together = passes(made, made.example, 6)
    for row in range(ROWS):
        check(made, together, [row])


@every
def test_order_and_company_do_not_matter(name: str) -> None:
    made = wrapped(name)
    together = passes(made, made.example, 6)
    for which in ([2, 0, 3, 1], [3, 3, 1], [1, 2] * 4):
        check(made, together, which)


@every
def test_chunks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and one pass at a time, then two passes of all rows."""
    made = wrapped(name)
    backend = made.model.backend

    def samples() -> Any:
        return mcdrop.predict(made.model, made.example, passes=5, keep_samples=True).samples

    whole, row_bytes = samples(), backend.row_bytes(made.rows)
    monkeypatch.setattr(backend, "chunk_bytes", 2 * ROWS * row_bytes)
    assert same(samples(), whole, tolerance(made.module))  # rows that depend on one another stay together
    monkeypatch.setattr(backend, "chunk_bytes", 1)
    try:
        equal = same(samples(), whole, tolerance(made.module))
    except MCDropError:
        equal = False
    assert equal or made.says_coupled, f"{name} hides that its rows depend on one another"


@pytest.fixture
def _hasty() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@every
@pytest.mark.usefixtures("_hasty")
def test_threads_and_plain_calls_in_between_do_not_matter(name: str) -> None:
    """Three threads ask for passes of seeds of their own, and use the user's module as it is in between."""
    made = wrapped(name)
    expected = [passes(made, made.example, 3, seed=seed) for seed in range(3)]
    ours = plain(made, made.module)
    # draws of its own in eval, or statistics that every call moves: then no two plain calls are equal anyway
    steady = torch.equal(ours, plain(made, made.module))
    start, one_user = threading.Barrier(3), threading.Lock()

    def work(seed: int) -> list[tuple[bool, bool]]:
        start.wait()
        found = []
        for _ in range(2):
            right = np.array_equal(passes(made, made.example, 3, seed=seed), expected[seed])
            with one_user:  # some networks cannot serve two users even without us
                clean = torch.equal(plain(made, made.module), ours)
            found.append((right, clean or not steady))
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[(True, True)] * 2] * 3
    assert not any(child.training for child in made.module.modules())


class Keeps(TwoLayers):
    """Puts its hidden units on itself, and takes them back a little later."""

    def forward(self, x: Tensor) -> Any:
        self.hidden = self.drop(self.first(x).relu())
        time.sleep(0.002)
        return self.last(self.hidden)


class KeepsInList(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.hidden.append(self.drop(self.first(x).relu()))
        time.sleep(0.002)
        return self.last(self.hidden.pop())


class Swaps(TwoLayers):
    """Puts a dropped weight in the place of its own for a while, as ``functional_call`` does."""

    def forward(self, x: Tensor) -> Any:
        weight = self.drop(self.first.weight)
        parameters: dict[str, Any] = self.first._parameters
        before, parameters["weight"] = self.first.weight, weight
        time.sleep(0.002)
        try:
            return self.last(self.first(x).relu())
        finally:
            parameters["weight"] = before


@pytest.mark.parametrize("kind", [Keeps, KeepsInList, Swaps])
def test_networks_that_keep_things_on_themselves_take_turns(kind: type[TwoLayers]) -> None:
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(4, 8)
    model = mcdrop.wrap(module, example=x)
    with torch.no_grad():
        ours = module(x)

    def answer(seed: int) -> Any:
        return model.backend.forward(model.rows(x), 3, seed=seed, start=0, sampler="iid")

    expected = [answer(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool, torch.no_grad():
        asked = [(seed, pool.submit(answer, seed)) for _ in range(4) for seed in range(3)]
        assert all(torch.equal(module(x), ours) for _ in range(10))
        assert all(np.array_equal(future.result(), expected[seed]) for seed, future in asked)


# -- longer rows -------------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """An encoder whose steps see only what came before them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Any:
        return self.body(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)


class Steps(nn.Module):
    """A recurrent network that answers at every step."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)[0]


def _pixels(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Conv2d(4, 2, 1))


# A network whose answer at a place needs no later place, and the shapes of a short and a long row.
LONGER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "a layer at each step": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), (5, 8), (40, 8)),
    "noise at each step": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(0.1, 0.9)), (1, 8), (17, 8)),
    "causal encoder": (Causal, (5, 8), (37, 8)),
    "LSTM": (lambda: Steps(nn.LSTM(8, 6, 3, dropout=0.3, batch_first=True)), (5, 8), (33, 8)),
    "GRU": (lambda: Steps(nn.GRU(8, 6, 2, dropout=0.3, batch_first=True)), (16, 8), (17, 8)),
    "image": (lambda: _pixels(nn.Dropout(0.3)), (3, 6, 7), (3, 30, 21)),
    "channels of an image": (lambda: _pixels(nn.Dropout2d(0.3)), (3, 6, 7), (3, 30, 21)),
}


@pytest.mark.parametrize(("make", "short", "long"), LONGER.values(), ids=LONGER)
def test_a_longer_row_has_the_masks_of_the_shorter_one_and_more(
    make: Callable[[], nn.Module], short: tuple[int, ...], long: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(3, *long)
    cut = x[(slice(None), *(slice(0, size) for size in short))]
    model = mcdrop.wrap(module, example=cut)
    found = [
        model.backend.forward(model.rows(rows), 6, seed=4, start=0, sampler="iid").astype(np.float64)
        for rows in (x, cut)
    ]
    inside = found[0][tuple(slice(0, size) for size in found[1].shape)]
    assert same(inside, found[1], 1e-5)
    assert found[1].std(axis=0).max() > 1e-3


def test_longer_texts_extend_the_masks_of_shorter_ones() -> None:
    """GPT-2 reads from left to right: the logits of the first words need no later word."""
    made = wrapped("gpt2_eager")
    ids = torch.randint(1, 50, (2, 14), generator=torch.Generator().manual_seed(0))
    long, short = ({"input_ids": part} for part in (ids, ids[:, :6]))
    assert same(passes(made, long, 5)[:, :, :6], passes(made, short, 5), 1e-5)


@pytest.mark.parametrize("name", ["lstm_packed", "gru_packed"])
def test_packed_rows_may_be_longer_than_those_of_the_example(name: str) -> None:
    """Its draws are as long as the longest row, so other rows of the same shape need larger masks or smaller ones."""
    made = wrapped(name)
    assert isinstance(made.example, tuple)
    x = made.example[0]
    module, _ = built(name)
    model = mcdrop.wrap(module, example=(x, torch.tensor([2, 1, 2, 2])))
    grown = Wrapped(made.specimen, module, made.example, model, [])
    for lengths in ([5, 1, 2, 4], [1, 2, 3, 1], [3, 5, 2, 5], [1, 1, 1, 1]):
        example = (x, torch.tensor(lengths))
        assert same(passes(grown, example, 5), passes(made, example, 5), 1e-5)


def test_a_network_that_takes_no_single_row_says_so() -> None:
    made = wrapped("batch_statistics")
    with pytest.raises(InputError, match=r"cannot take inputs of shape 0: \(1, 8\): Expected more than 1 value"):
        mcdrop.predict(made.model, taken(made.example, [0]))
    assert any("does not take a single row" in warning for warning in made.model.audit.warnings)


def test_rows_of_several_lengths_in_turn_do_not_disturb_one_another() -> None:
    made = wrapped("encoder")
    examples: list[Example] = [
        torch.randn(2, steps, 16, generator=torch.Generator().manual_seed(1)) for steps in (3, 9)
    ]
    first = [passes(made, example, 4) for example in examples]
    for example, expected in zip(examples, first, strict=True):
        np.testing.assert_array_equal(passes(made, example, 4), expected)
