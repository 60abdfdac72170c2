"""What inputs become: numbers that a network's type cannot hold are refused, never wrapped or cut off."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError

WHOLE = ["uint8", "int8", "int16", "int32", "int64"]


class Scaled(nn.Module):
    """Takes numbers of any type."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.float())  # type: ignore[no-any-return]


@cache
def takes(dtype: str) -> mcdrop.Model:
    return mcdrop.wrap(Scaled(), example=np.ones((4, 2), dtype))


def ends(dtype: str) -> tuple[int, int]:
    return (0, 1) if dtype == "bool" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def forms(low: Any, high: Any) -> list[Any]:
    """The same row as a list, an array and a tensor."""
    row = [[low, high]]
    return [row, np.array(row), torch.from_numpy(np.array(row))]


def given(dtype: str, x: Any) -> list[list[int]]:
    leaf = takes(dtype).rows(x).leaves[0]
    read: list[list[int]] = leaf.tolist()
    return read


@pytest.mark.parametrize("dtype", [*WHOLE, "bool"])
def test_the_ends_of_a_type_are_taken_and_what_lies_beyond_is_named(dtype: str) -> None:
    low, high = ends(dtype)
    for x in forms(low, high):
        assert given(dtype, x) == [[low, high]]
    beyond = [number for number in (low - 1, high + 1) if -(2**63) <= number < 2**63]
    for number in beyond:
        for x in forms(low, number):
            with pytest.raises(InputError, match=rf"input 'x' must be .* {low} to {high} \({dtype}\), got {number}$"):
                given(dtype, x)


@pytest.mark.parametrize("dtype", [*WHOLE, "bool"])
def test_whole_numbers_of_every_type_become_those_of_the_input_as_arrays_and_as_tensors(dtype: str) -> None:
    for kind in [*WHOLE, "bool", "float32"]:
        array = np.array([[0, 1], [1, 0]], kind)
        ours, theirs = (takes(dtype).rows(x).leaves[0] for x in (array, torch.from_numpy(array)))
        assert (ours.dtype, theirs.dtype) == (np.dtype(dtype), getattr(torch, dtype))
        assert ours.tolist() == theirs.tolist() == np.array([[0, 1], [1, 0]], dtype).tolist()


def test_ids_in_few_bits_do_not_wrap_around_inside_the_network() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head((ids - 5).float())  # type: ignore[no-any-return]

    ids = torch.arange(10).reshape(5, 2)
    model = mcdrop.wrap(Shifted(), example=ids, tuning={})
    expected = mcdrop.predict(model, ids, passes=8).mean
    for kind in (torch.uint8, torch.int16, torch.int32):
        np.testing.assert_array_equal(mcdrop.predict(model, ids.to(kind), passes=8).mean, expected)


@pytest.mark.parametrize("number", [2**63, 2**63 + 7, 2**64 - 1])
def test_whole_numbers_beyond_63_bits_do_not_become_negative(number: int) -> None:
    for x in ([[number, number]], np.array([[0, number]], np.uint64)):
        with pytest.raises(InputError, match=rf"from {-(2**63)} to {2**63 - 1} \(int64\), got {number}$"):
            given("int64", x)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "longdouble"])
def test_real_numbers_that_are_whole_and_in_range_are_taken(kind: Any) -> None:
    row = np.array([[-128, 127]], kind)
    assert given("int8", row) == [[-128, 127]]
    assert given("int64", row) == [[-128, 127]]
    with pytest.raises(InputError, match=r"from -128 to 127 \(int8\), got 128\.0"):
        given("int8", row + 1)


def test_real_numbers_that_may_stand_for_several_whole_ones_are_refused() -> None:
    """2**53 is what 2**53 + 1 rounds to, and the first float64 that is the nearest of two whole numbers."""
    last = 2**53 - 1
    assert float(last) != float(last + 1) == float(last + 2)
    for x in forms(float(-last), float(last)):
        assert given("int64", x) == [[-last, last]]
    for number in (float(2**53), -float(2**53), float(2**63 - 1024), -(2.0**63)):
        for x in forms(0.0, number):
            with pytest.raises(InputError, match=r"got -?9\S+ as a float64, which from 2\*\*53 on may be rounded"):
                given("int64", x)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8), ("float32", 24), ("float64", 53)])
def test_real_numbers_of_few_bits_may_be_rounded_sooner(dtype: str, bits: int) -> None:
    """From 2**bits on, the next whole number is none of the type."""
    kind = getattr(torch, dtype)
    last, first = 2**bits - 1, torch.tensor(2**bits + 1).to(kind)
    assert first == 2**bits
    below, beyond = torch.tensor([[-last, last]]).to(kind), torch.stack([first, -first])[None]
    arrays = () if dtype == "bfloat16" else (below.numpy(),)
    for x in (below, *arrays):
        assert given("int64", x) == [[-last, last]]
    for x in (beyond, -beyond, *(number.numpy() for number in (beyond, -beyond) if dtype != "bfloat16")):
        said = rf"got -?\d+\.0 as a {dtype}, which from 2\*\*{bits} on may be rounded"
        with pytest.raises(InputError, match=said):
            given("int64", x)


def test_whole_numbers_of_64_bits_are_taken_as_they_are_but_not_beside_a_real_one() -> None:
    for number in (2**53 + 1, 2**63 - 1, -(2**63)):
        assert given("int64", [[number, 1]]) == [[number, 1]]
        with pytest.raises(InputError, match="must be whole numbers"):
            given("int64", [[number, 1.0]])
    with pytest.raises(InputError, match="must be whole numbers"):
        given("int64", [[-(2**63) - 1, 1]])


def test_real_numbers_beyond_64_bits_are_out_of_range() -> None:
    for number in (2.0**63, 1e300, np.nextafter(-(2.0**63), -np.inf)):
        for x in forms(0.0, float(number)):
            with pytest.raises(InputError, match=r"\(int64\), got -?\d(\.\d+)?e\+\d+$"):
                given("int64", x)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_of_few_digits_are_checked_as_others(kind: torch.dtype) -> None:
    assert given("uint8", torch.tensor([[0.0, 255.0]], dtype=kind)) == [[0, 255]]
    with pytest.raises(InputError, match=r"from 0 to 255 \(uint8\), got 256\.0"):
        given("uint8", torch.tensor([[0.0, 256.0]], dtype=kind))


@pytest.mark.parametrize("number", [10**20, -(2**70)])
def test_whole_numbers_of_many_bits_are_taken_as_real_ones_and_by_no_type_of_whole_ones(number: int) -> None:
    assert given("float32", [[number, 2]]) == given("float32", [[float(number), 2.0]])
    with pytest.raises(InputError, match=rf"to {2**63 - 1} \(int64\), got {float(number)}".replace("+", r"\+")):
        given("int64", [[number, 2]])


def test_a_fraction_is_named_with_all_its_digits() -> None:
    for x, digits in ((19.0000001, "19.0000001"), (np.float32(0.1), "0.1"), (-1234567.5, "-1234567.5")):
        with pytest.raises(InputError, match=rf"must be whole numbers, got {digits}$"):
            given("int64", np.array([[x, x]]))


def test_fractions_are_no_truth_values() -> None:
    for x in forms(0.0, 0.5):
        with pytest.raises(InputError, match=r"must be whole numbers, got 0\.5"):
            given("bool", x)


def test_real_numbers_that_overflow_are_refused_in_tensors_too() -> None:
    for x in forms(0.0, 1e300):
        with pytest.raises(InputError, match="input 'x' holds numbers that are too large for float32"):
            given("float32", x)
    assert given("float32", torch.tensor([[0.0, 3e38]])) == torch.tensor([[0.0, 3e38]]).tolist()


class Embedded(nn.Module):
    """Adds what stands at a place of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(4, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(nn.functional.dropout(x + self.table(k), 0.3, self.training))
        return found


def test_inputs_that_a_network_cannot_take_are_told_as_they_were_given() -> None:
    x, k = np.ones((2, 3), np.float32), np.array([0, 3])
    for model in (mcdrop.wrap(Embedded(), example=example, tuning={}) for example in ((x, k), {"x": x, "k": k})):
        with pytest.raises(InputError, match=r"^the network cannot take inputs of shape x: \(2, 3\), k: \(2,\): "):
            mcdrop.predict(model, {"k": k + 1, "x": x}, passes=4)
    model = mcdrop.wrap(Embedded(), example=(x, k), tuning={})
    with pytest.raises(InputError, match=r"^the network cannot take inputs of shape 0: \(2, 3\), 1: \(2,\): "):
        mcdrop.predict(model, (x, k + 1), passes=4)


def test_a_deep_copy_shares_the_network_and_answers_the_same() -> None:
    model = mcdrop.wrap(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), example=torch.randn(4, 3))
    screened = model.with_screen(mcdrop.fit_screen(model, torch.randn(40, 3), fpr=0.1))
    other = copy.deepcopy({"inside": screened})["inside"]
    assert other.module is model.module
    x = torch.randn(5, 3)
    ours, theirs = (mcdrop.predict(one, x, passes=20) for one in (screened, other))
    np.testing.assert_array_equal(ours.mean, theirs.mean)
    np.testing.assert_array_equal(ours.p_value, theirs.p_value)


def test_sparse_rows_are_taken_as_dense_ones_are() -> None:
    model = mcdrop.wrap(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), example=torch.randn(4, 3))
    x = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    sparse = mcdrop.predict(model, x.to_sparse(), passes=20)
    np.testing.assert_allclose(sparse.mean, mcdrop.predict(model, x, passes=20).mean, rtol=1e-6)
    with pytest.raises(InputError, match="too large for float32"):
        mcdrop.predict(model, (x * 1e39).to_sparse(), passes=20)


def test_a_model_is_copied_but_not_pickled() -> None:
    model = mcdrop.wrap(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), example=torch.randn(4, 3))
    assert copy.copy(model).backend is model.backend
    for one in (model, mcdrop.Detector(model)):
        with pytest.raises(InputError, match=r"cannot be pickled; write it with mcdrop\.save\(model, folder\)"):
            pickle.dumps(one)


NETWORK, ROWS = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), np.ones((20, 3))
DOORS: dict[str, Callable[[Any, Path], object]] = {
    "calibrate": lambda net, _: mcdrop.calibrate(net, ROWS, ROWS[:, :2]),
    "export_onnx": lambda net, folder: mcdrop.export_onnx(net, folder / "net.onnx"),
    "export_torch": lambda net, folder: mcdrop.export_torch(net, folder / "net.pt2"),
    "fit": lambda net, _: mcdrop.Detector(net).fit(ROWS),
    "fit_screen": lambda net, _: mcdrop.fit_screen(net, ROWS),
    "interpret": lambda net, _: mcdrop.interpret(net, None, mcdrop.Options()),  # type: ignore[arg-type]
    "recalibrate_batchnorm": lambda net, _: mcdrop.recalibrate_batchnorm(net, ROWS),
    "sample": lambda net, _: mcdrop.sample(net, ROWS, mcdrop.PassPlan()),
    "save": lambda net, folder: mcdrop.save(net, folder / "net" / "1"),
    "screen": lambda net, _: mcdrop.screen(net, ROWS),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_network_that_was_not_wrapped_is_told_so(door: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"got Sequential; wrap a network first: mcdrop\.wrap\(network, example=rows\)"
    ):
        DOORS[door](NETWORK, tmp_path)
    assert not [*tmp_path.iterdir()]
