"""Rows: every form in which inputs may come, and what is refused."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from made import Frame
from numpy.typing import ArrayLike

from mcdrop.errors import InputError
from mcdrop.rows import Rows, by_name, check_named, numbers

GOOD = [[1.0, 2.0], [3.0, 4.0]]


def values(rows: Rows) -> dict[str, list[Any]]:
    return {name: np.asarray(leaf).tolist() for name, leaf in rows.named()}


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(GOOD, id="lists"),
        pytest.param(np.array(GOOD), id="float64"),
        pytest.param(np.array(GOOD, np.float32), id="float32"),
        pytest.param(np.array(GOOD, np.int16), id="whole numbers"),
        pytest.param(np.asfortranarray(GOOD), id="fortran order"),
        pytest.param(torch.tensor(GOOD), id="tensor"),
        pytest.param(torch.tensor(GOOD, requires_grad=True), id="tensor with a gradient"),
        pytest.param([np.array(row) for row in GOOD], id="list of arrays"),
        pytest.param(np.array(GOOD, object), id="objects"),
        pytest.param(np.ma.array(GOOD), id="masked array without a mask"),
        pytest.param(np.array([[True, np.float32(2)], [Fraction(3), Decimal(4)]]), id="numbers of several types"),
    ],
)
def test_one_input_may_come_as_anything_that_is_an_array(x: Any) -> None:
    rows = Rows.of(x)
    assert (rows.count, values(rows)) == (2, {"0": GOOD})


def test_a_tuple_is_several_inputs_and_a_dict_names_them() -> None:
    both = Rows.of((np.ones((3, 2)), torch.zeros(3, 4, dtype=torch.int64)))
    assert (both.count, [leaf.shape for leaf in both.args], both.kwargs) == (3, [(3, 2), (3, 4)], {})
    named = Rows.of({"ids": [[1, 2]], "mask": [[True, False]]})
    assert (named.count, named.args, values(named)) == (1, (), {"ids": [[1, 2]], "mask": [[True, False]]})
    assert Rows.of(named) is named


def test_splitting_and_taking_keep_the_rows_of_every_leaf_together() -> None:
    rows = Rows.of({"a": np.arange(7), "b": torch.arange(14).reshape(7, 2)})
    parts = list(rows.split(3))
    assert [part.count for part in parts] == [3, 3, 1]
    assert np.concatenate([part.kwargs["a"] for part in parts]).tolist() == list(range(7))
    assert torch.equal(torch.cat([part.kwargs["b"] for part in parts]), rows.kwargs["b"])
    chosen = rows.take(np.array([5, 0]))
    assert values(chosen) == {"a": [5, 0], "b": [[10, 11], [0, 1]]}
    assert next(rows.split(7)) is rows


def test_the_leaves_are_the_users_own_and_unchanged() -> None:
    x = np.arange(6.0).reshape(3, 2)
    assert Rows.of(x).args[0] is x
    doubled = Rows.of(x).map(lambda leaf: leaf * 2)
    assert doubled.args[0].tolist() == (x * 2).tolist()
    assert x.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([["a"]], "inputs must be numbers, got the text 'a'"),
        ("hello", "inputs must be numbers, got the text 'hello'"),
        ([[1, None]], "inputs must be numbers, got a missing value (null)"),
        ([[1j]], "inputs must be numbers, got values of type complex128"),
        (torch.tensor([[1j]]), "inputs must be numbers, got values of type torch.complex64"),
        (None, "inputs must be numbers, got a missing value (null)"),
        (np.array([1.0, "2"], object), "inputs must be numbers, got the text '2'"),
        (np.array([[1.0, np.datetime64("2020-01-01")]], object), "must be numbers, got values of type datetime64[D]"),
        (np.array([[1.0], [2.0, 3.0]], object), "inputs must be numbers, got values of type object"),
        (np.array([[True, None]]), "inputs must be numbers, got a missing value (null)"),
        (np.array([[1.0, 2.0], [True, np.nan]], object), "inputs must be finite numbers; row 1 holds nan at [1]"),
        (np.ma.masked_greater(GOOD, 3), "inputs must have no masked values; row 1 is masked at [1]"),
        ((np.ones(2), np.ma.masked_equal([1, 2], 1)), "input 1 must have no masked values; row 0 is masked"),
        ({1, 2}, "inputs must be numbers, got one object of type set"),
        ([[1, 2], [3]], "inputs must be rows of equal length; row 0 has 2 values and row 1 has 1"),
        ([[1, 2], 3], "inputs must be rows of equal length; row 0 has 2 values and row 1 has a single number"),
        ([[[1], [2, 3]]], "inputs must be rows of equal length; some row is nested unevenly"),
        ([[1.0, 2.0], [3.0, float("nan")]], "inputs must be finite numbers; row 1 holds nan at [1]"),
        ([1.0, float("inf")], "inputs must be finite numbers; row 1 holds inf"),
        (torch.tensor([[1.0], [float("-inf")]]), "inputs must be finite numbers; row 1 holds -inf at [0]"),
        (torch.tensor([[float("nan")]], dtype=torch.bfloat16), "inputs must be finite numbers; row 0 holds nan"),
        (3.0, "inputs must have rows as its first dimension, got a single number"),
        (torch.tensor(3.0), "inputs must have rows as its first dimension, got a single number"),
        ([], "inputs hold no rows; give at least one"),
        (np.empty((0, 4)), "inputs hold no rows; give at least one"),
        ((), "no inputs were given"),
        ({}, "no inputs were given"),
        ((np.ones((2, 1)), np.ones((3, 1))), "all inputs must have the same number of rows, got [2, 3]"),
        ({"a": [1.0], "b": ["x"]}, "'b' must be numbers, got the text 'x'"),
        (([1.0], [float("nan")]), "input 1 must be finite numbers; row 0 holds nan"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(x: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Rows.of(x)
    assert said in str(caught.value)


@pytest.mark.parametrize("number", [10**20, -(2**63) - 1, 2**64, int(np.finfo(np.float64).max)])
def test_a_whole_number_of_many_bits_is_the_real_number_that_it_is_written_for(number: int) -> None:
    """JavaScript writes 1e20 as 100000000000000000000."""
    assert values(Rows.of([[number, 2, 0.5]])) == values(Rows.of([[float(number), 2.0, 0.5]]))
    assert values(Rows.of([[number, 2]])) == {"0": [[float(number), 2.0]]}


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63)])
def test_whole_numbers_in_a_frame_keep_every_digit(number: int) -> None:
    assert values(Rows.of(Frame(["a", "b"], np.array([[number, 0]], object)))) == {"0": [[number, 0]]}


@pytest.mark.parametrize(
    "x", [[[10**400]], [[2**1024, 0.5]], [["1.5"]], [[b"1"]], np.array(["2020-01-01"], "datetime64[D]")]
)
def test_what_is_not_a_number_of_any_size_is_an_input_error(x: ArrayLike) -> None:
    with pytest.raises(InputError):
        Rows.of(x)


def test_tensors_in_a_list_are_rows() -> None:
    assert values(Rows.of([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])) == {"0": GOOD}
    learnt = [torch.tensor(row, requires_grad=True) for row in GOOD]
    assert values(Rows.of(learnt)) == {"0": GOOD}
    with pytest.raises(InputError, match="row 0 has 2 values and row 2 has 1"):
        Rows.of([*learnt, torch.tensor([3.0])])


# -- data frames -------------------------------------------------------------------------------------------------------


class NAType:
    """A missing value as pandas gives it."""


def test_columns_are_taken_by_name() -> None:
    frame = Frame(["b", "more", "a"], np.arange(6.0).reshape(2, 3))
    assert values(Rows.of(by_name(frame, ["a", "b"]))) == {"0": [[2, 0], [5, 3]]}
    with pytest.raises(InputError, match=r"the rows have no column c, d; the model reads a, c, d$"):
        by_name(frame, ["a", "c", "d"])


def test_all_columns_that_a_table_lacks_are_named() -> None:
    check_named(["a", "b"], ["b", "more", "a"], "t.csv")
    with pytest.raises(InputError, match=r"^t\.csv lacks the columns 'b', 'c d'; the model takes 'a', 'b', 'c d'$"):
        check_named(["a", "b", "c d"], ["a", "more"], "t.csv")
    many = [f"f{i}" for i in range(30)]
    with pytest.raises(InputError, match=r"'f7' and 22 more; the model takes 'f0', .*, 'f7' and 22 more$"):
        check_named(many, ["more"], "t.csv")


def test_rows_without_names_are_as_they_are() -> None:
    numbered = Frame([0, 1], np.ones((2, 2)))
    for x, names in ((numbered, ["a", "b"]), (np.array(GOOD), ["a", "b"]), (numbered, None), ({"a": GOOD}, ["a"])):
        assert by_name(x, names) is x


def test_a_frame_may_hold_numbers_of_several_types_and_nothing_else() -> None:
    mixed = Frame(["a", "b"], np.array([[1.0, True], [3, np.float32(4)]], object))
    assert values(Rows.of(mixed)) == {"0": [[1, 1], [3, 4]]}
    for wrong, said in ((NAType(), "a missing value"), ("x", "the text 'x'"), (1j, "values of type object")):
        with pytest.raises(InputError, match=f"inputs must be numbers, got {said}"):
            Rows.of(Frame(["a", "b"], np.array([[1.0, wrong]], object)))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_of_a_tensor_are_an_array(dtype: torch.dtype) -> None:
    found = numbers(torch.tensor(GOOD, dtype=dtype, requires_grad=True), "targets")
    assert (found.dtype.name, found.tolist()) == ("float64", GOOD)
    assert numbers(torch.tensor([1, 2]), "labels").dtype.name == "int64"
    with pytest.raises(InputError, match="targets must be finite numbers; row 1 holds nan"):
        numbers(torch.tensor([0.0, float("nan")]), "targets")
