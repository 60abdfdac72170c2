"""Files of rows: Parquet is read as strictly as CSV, and columns go beside the rows they were computed from."""

import csv
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from mcdrop import streams
from mcdrop.cli import predicted
from mcdrop.errors import InputError
from mcdrop.files import append_columns, check_target, read_inputs, read_pairs, read_targets, rows_at_once, state_of
from mcdrop.fitting import calibrate
from mcdrop.model import Model
from mcdrop.predict import predict
from mcdrop.table import CELLS_PER_BLOCK
from mcdrop.wrapping import wrap

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


class Bag(nn.Module):
    """Takes whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.EmbeddingBag(300, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(nn.functional.dropout(self.embedding(x.long()), 0.3, self.training))
        return found


def taking(dtype: str) -> Model:
    """A model of two columns, a and b, of a type."""
    net = Bag() if dtype.startswith(("int", "uint")) else nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 1))
    return replace(wrap(net, example=np.ones((4, 2), dtype)), features=["a", "b"])


def write(path: Path, columns: list[Any], names: str = "ab") -> Path:
    """Writes columns of these one-letter names as the suffix says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([names, *zip(*columns, strict=True)])
    else:
        parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], [*names]), path)
    return path


def message(model: Model, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_inputs(model, path))
    return str(caught.value).replace(str(path), path.name)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("dtype", "given", "shown"),
    [
        ("int64", 1.7, "1.7"),
        ("int64", 2.0**63, str(2.0**63)),
        ("uint8", 300, "300"),
        ("uint8", -1, "-1"),
        ("float32", 1e300, "1e+300"),
    ],
)
def test_a_number_that_the_model_cannot_take_is_refused(
    tmp_path: Path, suffix: str, dtype: str, given: float, shown: str
) -> None:
    said = message(taking(dtype), write(tmp_path / f"rows.{suffix}", [[1.0, 2.0], [3, given]]))
    assert "column 'b' holds" in said
    assert shown in said
    assert dtype in said
    assert "row 1" in said or "line 3" in said


def test_whole_numbers_of_any_type_are_read(tmp_path: Path) -> None:
    for column in ([1, 2], [1.0, 2.0], np.array([1, 2], np.uint8)):
        (found,) = read_inputs(taking("int64"), write(tmp_path / "rows.parquet", [column, [0, 299]]))
        assert found.dtype == np.int64
        assert found.tolist() == [[1, 0], [2, 299]]


def test_whole_numbers_of_64_bits_are_read_to_the_last_digit(tmp_path: Path) -> None:
    numbers = [2**53 + 1, 1733250000000000123, 2**63 - 1, -(2**63)]
    column = pyarrow.array(numbers)
    others = (column.cast(pyarrow.string()), column.dictionary_encode(), column.cast(pyarrow.decimal128(19)))
    for one in (column, *others, column.cast(pyarrow.string()).dictionary_encode()):
        (found,) = read_inputs(taking("int64"), write(tmp_path / "rows.parquet", [one, [1] * 4]))
        assert found[:, 0].tolist() == numbers
    (found,) = read_inputs(taking("int64"), write(tmp_path / "rows.csv", [numbers, [1] * 4]))
    assert found[:, 0].tolist() == numbers


@pytest.mark.parametrize(("kind", "digits"), [(pyarrow.float32(), 24), (pyarrow.float16(), 11)])
def test_real_numbers_of_few_digits_are_refused_from_there_on(tmp_path: Path, kind: Any, digits: int) -> None:
    """In float32 2^24 + 1 is 2^24."""
    whole, below = (pyarrow.array([1.0, 2.0**digits - off], pyarrow.float64()).cast(kind) for off in (0, 1))
    said = message(taking("int64"), write(tmp_path / "rows.parquet", [[1, 2], whole]))
    assert f"as a float, which from 2**{digits} on may be rounded" in said
    (found,) = read_inputs(taking("int64"), write(tmp_path / "rows.parquet", [[1, 2], below]))
    assert found[:, 1].tolist() == [1, 2**digits - 1]


@pytest.mark.parametrize("given", [float(2**53), -1e18, pyarrow.scalar(1e18).cast(pyarrow.float32()).as_py()])
def test_real_numbers_that_may_be_rounded_are_refused_where_whole_ones_are_read(tmp_path: Path, given: float) -> None:
    for column in ([1.0, given], pyarrow.array([1.0, given]).dictionary_encode(), ["1.0", repr(given)]):
        said = message(taking("int64"), write(tmp_path / "rows.parquet", [[1, 2], column]))
        assert said == (
            f"rows.parquet, row 1, column 'b' holds {given} as a float, which from 2**53 on may be rounded; store the "
            "column as int64"
        )


def test_an_id_that_is_missing_is_named_as_such_beside_long_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [[2**60 + 1, None], [1, 2]])
    assert message(taking("int64"), path) == "rows.parquet, row 1, column 'a' is empty or not a finite number"
    path = write(tmp_path / "rows.parquet", [[2**60, 1], [1, 2]])
    assert (
        message(taking("int32"), path) == f"rows.parquet, row 0, column 'a' holds {2.0**60}, but the model takes int32"
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.{suffix}", [[1.0], [5.0], [3.0]], "aab")
    assert "'a' more than once" in message(taking("float32"), path)
    with pytest.raises(InputError, match="'a' more than once"):
        read_targets(path, ["a"])
    other = write(tmp_path / f"other.{suffix}", [[1.0], [5.0], [3.0], [4.0]], "zzab")
    assert [rows.tolist() for rows in read_inputs(taking("float32"), other)] == [[[3, 4]]]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([datetime.datetime(2020, 1, 1)], "timestamp"),
        ([[0.1, 0.2]], "list"),
        ([{"q": 1.0}], "struct"),
        (["text"], "string"),
        ([2**53 + 1], "int64"),
    ],
)
def test_what_is_no_column_of_numbers_is_refused(tmp_path: Path, column: list[Any], kind: str) -> None:
    path = write(tmp_path / "rows.parquet", [[1.0], column])
    said = message(taking("float32"), path)
    assert said.startswith(f"rows.parquet, column 'b' holds {kind}")
    assert said.endswith("not numbers that a float64 can hold")


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [pyarrow.array([], pyarrow.float64())] * 2)
    assert message(taking("float32"), path) == "rows.parquet holds no rows; give at least one row"
    with pytest.raises(InputError, match="holds no rows"):
        read_targets(path, ["a"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_and_targets_are_those_of_one_file(tmp_path: Path, suffix: str) -> None:
    path, model = write(tmp_path / f"rows.{suffix}", [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "aby"), taking("float32")
    x, y = read_pairs(model, path, ["y"])
    assert (x.tolist(), y.tolist()) == ([[1, 3], [2, 4]], [[5], [6]])

    def rewrite(done: int) -> None:
        write(path, [[2.0, 1.0], [4.0, 3.0], [6.0, 5.0]], "aby")

    with pytest.raises(InputError, match="has changed while it was read; try again when nothing writes to it"):
        read_pairs(model, path, ["y"], advance=rewrite)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [[1.0, 2.0], [3.0, 4.0]])
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 36 + data[40:])
    assert message(taking("float32"), path).startswith("cannot read rows.parquet: ")


def test_a_file_that_is_damaged_anywhere_is_an_error_of_ours_or_read(tmp_path: Path) -> None:
    """Whatever a byte of it is changed to; pyarrow has errors of several kinds for that."""
    model, path = taking("float32"), write(tmp_path / "rows.parquet", [[1.0, 2.0], [3.0, 4.0]])
    data, refused = path.read_bytes(), 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            list(read_inputs(model, path))
        except InputError:
            refused += 1
    assert refused


def test_names_that_are_not_utf_8_are_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"aaaa": [1.0], "b": [2.0]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"aaaa", "aöa".encode("latin-1").center(4)))
    assert message(taking("float32"), path).startswith("cannot read rows.parquet as Parquet: ")
    with pytest.raises(InputError, match="as Parquet"):
        check_target(path, tmp_path / "out.parquet", ["score"])


@pytest.mark.parametrize("text", ["ä,b\n1,2\n".encode("latin-1"), b"\n1,2\n", b'"a\n1,2\n', b"a,b" * 40])
def test_what_is_no_table_is_told_alike_before_the_work_and_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    """The header that is looked at before the work is read as the rows are, with the same bound."""
    monkeypatch.setattr("mcdrop.table.MAX_LINE", 100)
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    said = message(taking("float32"), path)
    with pytest.raises(InputError) as caught:
        check_target(path, tmp_path / "out.csv", ["score"])
    assert str(caught.value).replace(str(path), path.name) == said


@pytest.mark.parametrize("name", ["A", " a", "a "])
def test_a_name_that_is_nearly_right_is_shown(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({name: [1.0], "b": [2.0]}), path)
    assert message(taking("float32"), path) == (
        f"rows.parquet has a column {name!r}, but the model takes 'a'; rename the column"
    )


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_columns_are_written_beside_their_rows_or_not_at_all(tmp_path: Path, suffix: str, rows: int) -> None:
    """The three scores belong to a file that had three rows."""
    source, target = write(tmp_path / f"rows.{suffix}", [np.arange(rows)] * 2), tmp_path / f"out.{suffix}"
    with pytest.raises(InputError, match="has changed while it was read"):
        append_columns(taking("float32"), source, target, {"score": np.zeros(3)})
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_that_were_written_again_are_others(tmp_path: Path, suffix: str) -> None:
    source, target = write(tmp_path / f"rows.{suffix}", [[1.0, 2.0], [3.0, 4.0]]), tmp_path / f"out.{suffix}"
    score, since = {"score": np.array([0.5, 1.5])}, state_of(source)
    assert append_columns(taking("float32"), source, target, score, since=since) == 2
    write(tmp_path / f"new.{suffix}", [[2.0, 1.0], [4.0, 3.0]]).replace(source)
    target.unlink()
    with pytest.raises(InputError, match="has changed while it was read"):
        append_columns(taking("float32"), source, target, score, since=since)
    assert list(tmp_path.iterdir()) == [source]


def test_a_parquet_file_keeps_its_types_and_goes_where_a_link_leads(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1.0, 2.0], "b": [3, 4], "k": pyarrow.array(["u", "v"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "real.parquet")
    score = np.array([0.5, 1.5])
    append_columns(taking("float32"), tmp_path / "rows.parquet", tmp_path / "link.parquet", {"score": score})
    assert (tmp_path / "link.parquet").is_symlink()
    found = parquet.read_table(tmp_path / "real.parquet")
    assert found.drop_columns("score").equals(table)
    assert found["score"].to_pylist() == score.tolist()


def test_a_target_is_tried_and_left_as_it_is(tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.csv", [[1], [2]]), tmp_path / "out.csv"
    check_target(source, target, ["score"])
    assert not target.exists()
    target.write_text("old")
    check_target(source, target, ["score"])
    assert target.read_text() == "old"
    with pytest.raises(InputError, match="No such file"):
        check_target(source, tmp_path / "no" / "out.csv", ["score"])
    with pytest.raises(InputError, match="Is a directory"):
        check_target(source, tmp_path, ["score"])
    assert {*tmp_path.iterdir()} == {source, target}


def test_a_file_that_is_written_again_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "secret.csv"
    for mode in (0o600, 0o640):
        target.touch()
        target.chmod(mode)
        with streams.writing(target) as stream:
            stream.write("x")
        assert target.stat().st_mode & 0o777 == mode
        assert target.read_text() == "x"
    assert [*tmp_path.iterdir()] == [target]


def test_files_of_long_names_do_not_meet_while_they_are_written(tmp_path: Path) -> None:
    targets = [tmp_path / f"{'n' * 100}{end}" for end in "ab"]
    with streams.writing(targets[0]) as one, streams.writing(targets[1]) as other:
        one.write("one")
        other.write("other")
    assert [target.read_text() for target in targets] == ["one", "other"]


# -- how much at once --------------------------------------------------------------------------------------------------


def classes(count: int) -> Model:
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.3), nn.Linear(4, count))
    model = wrap(net, example=np.ones((4, 1), "float32"), task="classification", tuning={})
    return replace(model, features=["a"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_that_have_many_outputs_are_read_few_at_once(tmp_path: Path, suffix: str) -> None:
    """What a screen makes of a block, such as the chances and votes of each class, is no larger than a block of a
    wide table; and the rows are the same.
    """
    rows = np.arange(400.0)
    blocks = list(read_inputs(classes(200), write(tmp_path / f"rows.{suffix}", [rows], "a")))
    assert max(map(len, blocks)) * 2 * 200 <= CELLS_PER_BLOCK
    assert np.concatenate(blocks).ravel().tolist() == rows.tolist()


@pytest.mark.parametrize(("outputs", "options"), [(200, {"passes": 2}), (10, {"passes": 2000, "interval": "quantile"})])
def test_a_block_of_predictions_is_as_small_as_one_of_rows(
    tmp_path: Path, outputs: int, options: dict[str, Any]
) -> None:
    model, rows = classes(outputs), np.linspace(-1, 1, 400)
    tables = [*predicted(model, str(write(tmp_path / "rows.csv", [rows], "a")), options, "", lambda position: None)]
    most = max(len(table.rows) for table in tables)
    assert most * len(tables[0].header) <= CELLS_PER_BLOCK
    if "interval" in options:
        assert most * options["passes"] * outputs * 4 <= 2**24  # bytes; 400 rows would keep about twice that
    expected, place = predict(model, rows[:, None], **options), tables[0].header.index("lower_0")
    found = [row[place] for table in tables for row in table.rows]
    np.testing.assert_allclose(found, expected.lower[:, 0], rtol=1e-4, atol=1e-6)


def test_passes_that_a_calibration_keeps_count_too() -> None:
    x = np.linspace(-1, 1, 60).astype("float32")[:, None]
    plain = wrap(nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.3), nn.Linear(4, 1)), example=x[:4], tuning={})
    most = {}
    for method in ("cqr", "standardised"):
        model = plain.with_calibration(calibrate(plain, x, 2 * x, method=method, passes=2000))
        most[method] = rows_at_once(model, {"passes": 2000, "interval": "conformal"})
    assert most["cqr"] * 2000 * 4 <= 2**24 < most["standardised"] * 2000 * 4


def test_a_network_for_one_number_of_rows_is_not_cut() -> None:
    class Four(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 4
            return nn.functional.dropout(x, 0.3, self.training)

    model = wrap(Four(), example=np.ones((4, 1), "float32"), tuning={})
    assert rows_at_once(model, {}) > CELLS_PER_BLOCK
