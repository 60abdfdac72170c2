"""Tables: which columns are read, what is refused, and that a file appears whole or not at all."""

import contextlib
import csv
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import pytest

from mcdrop.audit import Audit
from mcdrop.errors import InputError
from mcdrop.predict import Prediction
from mcdrop.streams import check_place
from mcdrop.table import Block, Table, read_rows, with_prediction, write_rows


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def only(path: Path, **options: Any) -> Block:
    blocks = list(read_rows(path, **options))
    assert len(blocks) == 1
    return blocks[0]


def message(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path, **options))
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "rows.csv")


def test_columns_are_found_by_name_in_any_order_among_others(tmp_path: Path) -> None:
    path = write(tmp_path, "id,b,note,a\n7,2,hello,1\n8,4,,3\n")
    block = only(path, width=2, features=["a", "b"])
    assert block.values.tolist() == [[1, 2], [3, 4]]
    assert block.cells == [["7", "2", "hello", "1"], ["8", "4", "", "3"]]
    assert block.header == ["id", "b", "note", "a"]


def test_columns_go_by_position_when_the_names_are_other(tmp_path: Path) -> None:
    path = write(tmp_path, "first,second\n1,2\n")
    assert only(path, width=2, features=["a", "b"]).values.tolist() == [[1, 2]]
    assert only(path, width=2).values.tolist() == [[1, 2]]


def test_a_file_without_a_header_works_and_gets_names(tmp_path: Path) -> None:
    path = write(tmp_path, "1,2\n3,4\n")
    assert only(path, width=2).header == ["x_0", "x_1"]
    block = only(path, width=2, features=["a", "b"])
    assert (block.header, block.values.tolist()) == (["a", "b"], [[1, 2], [3, 4]])


def test_names_that_are_all_other_are_read_by_position_and_noted(tmp_path: Path) -> None:
    told: list[str] = []
    path = write(tmp_path, "first,second\n1,2\n")
    for features in (["a", "b"], None):  # a model without names has none to be mistaken for others
        list(read_rows(path, width=2, features=features, note=told.append))
    list(read_rows(write(tmp_path, "b,a\n1,2\n"), width=2, features=["a", "b"], note=told.append))
    assert told == [f"{path} names none of the columns that the model reads, so they go by position: 'a', 'b'"]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_the_same_letters_in_another_code_are_never_passed_over(
    tmp_path: Path, form: Literal["NFC", "NFD", "NFKC", "NFKD"]
) -> None:
    """macOS writes names of files with the accents as characters of their own."""
    features = ["länge", "ﬁsch"]  # the second begins with one character for two letters
    path = write(tmp_path, normalize(form, "ﬁsch,länge\n1,2\n"))
    if form == "NFC":
        assert only(path, width=2, features=features).values.tolist() == [[2, 1]]
    else:
        assert "; rename the column" in message(path, width=2, features=features)
    if form == "NFD":
        said = r"has a column 'la\u0308nge', but the model takes 'l\xe4nge'"
        assert said in message(path, width=2, features=features)


def test_only_a_file_without_a_header_is_noted(tmp_path: Path) -> None:
    told: list[str] = []
    path = write(tmp_path, "0,1\n1,2\n3,4\n")
    assert len(list(read_rows(path, width=2, chunk=1, note=told.append))) == 3
    assert told == [f"the first line of {path} holds numbers, so it is read as a row, not as the names of columns"]
    list(read_rows(write(tmp_path, "a,b\n1,2\n"), width=2, note=told.append))
    assert len(told) == 1


@pytest.mark.parametrize("header", ["B,A", "A,b", "note,b,A"])
def test_names_that_differ_in_case_alone_are_neither_taken_nor_passed_over(tmp_path: Path, header: str) -> None:
    path = write(tmp_path, f"{header}\n" + ",".join("1" for _ in header.split(",")) + "\n")
    assert "has a column 'A', but the model takes 'a'; rename" in message(path, width=2, features=["a", "b"])


def test_blanks_around_names_do_not_count(tmp_path: Path) -> None:
    assert only(write(tmp_path, "b, a\n1,2\n"), width=2, features=[" a", "b "]).values.tolist() == [[2, 1]]


def test_names_that_the_model_tells_apart_by_case_are_no_mistake(tmp_path: Path) -> None:
    assert only(write(tmp_path, "A,a\n1,2\n"), width=2, features=["a", "A"]).values.tolist() == [[2, 1]]
    assert "lacks the column 'A'" in message(write(tmp_path, "a,c\n1,2\n"), width=2, features=["a", "A"])


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfa,b\r\n1,2\r\n3,4\r\n",
        b"a,b\r1,2\r3,4",
        b'"a","b"\n"1","2"\n3, 4 \n\n\n',
        b" a ,b\n1,2\n3,4\n,\n",
        b'note,a,b\n"two\nlines, one cell",1,2\n"a ""quote""",3,4\n',
        b"a,b\n1e0,+2\n3.0,4\n",
    ],
    ids=["bom-crlf", "cr", "quoted-blank-end", "padded-empty-end", "quoted-newline", "notations"],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, text: bytes) -> None:
    assert only(write(tmp_path, text), width=2, features=["a", "b"]).values.tolist() == [[1, 2], [3, 4]]


def test_one_column(tmp_path: Path) -> None:
    assert only(write(tmp_path, "x\n0.5\n1\n"), width=1).values.tolist() == [[0.5], [1]]
    assert only(write(tmp_path, "0.5\n1"), width=1).values.tolist() == [[0.5], [1]]


def test_other_columns_may_share_a_name_but_the_models_may_not(tmp_path: Path) -> None:
    assert only(write(tmp_path, "n,n,a\n1,2,3\n"), width=1, features=["a"]).values.tolist() == [[3]]
    assert "'a' more than once" in message(write(tmp_path, "a,a\n1,2\n"), width=1, features=["a"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3,hello\n", "rows.csv, line 3, column 'b' holds 'hello', which is not a number"),
        ("a,b\n1,2\n3\n", "rows.csv, line 3 must have 2 cells, got 1"),
        ("a,b\n1,2\n3,4,5\n", "rows.csv, line 3 must have 2 cells, got 3"),
        ("a,b\nNaN,2\n", "rows.csv, line 2, column 'a' holds 'NaN', which is not a finite number"),
        ("a,b\n1,-inf\n", "rows.csv, line 2, column 'b' holds '-inf', which is not a finite number"),
        ("a,b\n1,1e39\n", "rows.csv, line 2, column 'b' holds '1e39', which is too large for float32"),
        ("a,b\n1,1e999\n", "not a finite number"),
        ("a,b\n1,\n", "rows.csv, line 2, column 'b' is empty; every row needs a number there"),
        ("a,b\n1,1_0\n", "line 2, column 'b' holds '1_0', which is not a number"),
        ("1,x\n", "line 1, column 'b' holds 'x', which is not a number"),
        ("a\n1\n", "rows.csv lacks the column 'b'; the model takes 'a', 'b'"),
        ("p,q,r\n1,2,3\n", "must have 2 columns, got 3; name them in a header ('a', 'b') or give no other column"),
        ("1,2,3\n", "must have 2 columns, got 3"),
        ("a;b\n1;2\n", "it looks separated by semicolons"),
        ("a\tb\n1\t2\n", "it looks separated by tabs"),
        ("", "rows.csv is empty; give a header and at least one row"),
        ("\n\n", "rows.csv is empty"),
        ("a,b\n", "rows.csv holds a header and no rows"),
        ("a,b\n1,2\n\n3,4\n", "rows.csv, line 3 is blank but rows follow it"),
        ('a,b\n1,"2\n', "rows.csv, line 2: unexpected end of data"),
        (b"a,b\n1,2\n\xff\xfe,3\n", "is not UTF-8 text"),
        (
            "a,b\n1,2\n" + "1" * 200_000 + ",2\n",
            "line 3, column 'a' holds '" + "1" * 40 + "...', which is not a finite",
        ),
        ("a,b\n1," + "y" * 100 + "\n", "'" + "y" * 40 + "...'"),
    ],
)
def test_a_bad_table_is_refused_with_its_place(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in message(write(tmp_path, text), width=2, features=["a", "b"])


def test_quoted_line_breaks_do_not_shift_the_line_number(tmp_path: Path) -> None:
    path = write(tmp_path, 'note,a\n"one\ntwo",1\nx,bad\n')
    assert "line 4, column 'a'" in message(path, width=1, features=["a"])


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcdrop.table.MAX_LINE", 1000)
    assert "line 2 is longer than 1000 characters" in message(write(tmp_path, "x\n" + "1," * 600), width=1)


def test_a_cell_of_text_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    """Python's own reader stops at 131072 characters."""
    note = "y" * 200_000
    block = only(write(tmp_path, f'note,a\n"{note}\nand more",1\n'), width=1, features=["a"])
    assert (block.cells, block.values.tolist()) == ([[f"{note}\nand more", "1"]], [[1]])


def test_whole_numbers_for_a_model_that_takes_them(tmp_path: Path) -> None:
    block = only(write(tmp_path, "a\n1\n2.0\n"), width=1, dtype="int64")
    assert block.values.dtype == np.int64
    assert block.values.tolist() == [[1], [2]]
    assert "'1.5', but the model takes int64" in message(write(tmp_path, "a\n1.5\n"), width=1, dtype="int64")
    assert "'300', but the model takes uint8" in message(write(tmp_path, "a\n300\n"), width=1, dtype="uint8")


def test_whole_numbers_of_64_bits_are_read_to_the_last_digit(tmp_path: Path) -> None:
    numbers = [2**53 + 1, 1733250000000000123, 2**63 - 1, -(2**63), 2**53 - 1]
    path = write(tmp_path, "a\n" + "".join(f" {number}\n" for number in numbers))
    assert only(path, width=1, dtype="int64").values.tolist() == [[number] for number in numbers]
    assert only(write(tmp_path, "a\n1e3\n9007199254740991.0\n"), width=1, dtype="int64").values[1, 0] == 2**53 - 1
    for number in (2**63, -(2**63) - 1):
        assert "but the model takes int64" in message(write(tmp_path, f"a\n{number}\n"), width=1, dtype="int64")
    for text in ("9007199254740992.0", "1.733250000000000123e18", "-1e18"):
        said = message(write(tmp_path, f"a\n{text}\n"), width=1, dtype="int64")
        assert said.endswith(f"{text!r}, which may be rounded; write all its digits, without a point or an exponent")
    assert "'1_0', which is not a number" in message(write(tmp_path, "a\n1_0\n"), width=1, dtype="int64")
    assert "'2', but the model takes bool" in message(write(tmp_path, "a\n1\n2\n"), width=1, dtype="bool")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "no.csv", width=1)
    assert "Is a directory" in message(tmp_path, width=1)


def test_blocks_give_the_same_rows_as_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + "".join(f"{i},{i / 7}\n" for i in range(1000)))
    whole = only(path, width=2).values
    blocks = list(read_rows(path, width=2, chunk=64))
    assert [len(block.cells) for block in blocks] == [64] * 15 + [40]
    assert (np.concatenate([block.values for block in blocks]) == whole).all()
    assert blocks[0].position <= blocks[-1].position == path.stat().st_size


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A pipe that would give ten million rows is read only as far as the blocks that were asked for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    written = 0

    def pour() -> None:
        nonlocal written
        with contextlib.suppress(BrokenPipeError), pipe.open("w") as stream:
            for written in range(10_000_000):
                stream.write(f"{written}\n")

    writer = threading.Thread(target=pour)
    writer.start()
    rows = read_rows(pipe, width=1)
    assert next(rows).values[0, 0] == 0
    rows.close()  # type: ignore[attr-defined]  # a generator: the writer meets a broken pipe and ends
    writer.join()
    assert written < 1_000_000


def prediction(rows: int = 2, outputs: int = 1, **known: Any) -> Prediction:
    """Counts up from 0 in the mean, from 1 in the variance, and so on; predictions of models are in test_cli.py."""
    wide = np.arange(rows * outputs, dtype=float).reshape(rows, outputs)
    arrays: dict[str, Any] = {
        name: wide + i for i, name in enumerate(["mean", "variance", "std", "lower", "upper", "standard_error"])
    }
    arrays |= {"epistemic": wide, "deterministic": wide, "aleatoric": None, "passes": np.full(rows, 2)}
    options: dict[str, Any] = {"seed": 0, "level": 0.9, "interval": "normal", "interval_kind": "credible"}
    return Prediction(**arrays, **options, audit=Audit("", 0, (), ()), **known)


def block(header: list[str], cells: list[list[str]]) -> Block:
    return Block(header, cells, np.zeros((len(cells), 1)))


def test_the_prediction_follows_the_input_columns() -> None:
    scored = prediction(score=np.array([0.5, 2]), p_value=np.array([0.9, 0.001]), is_anomaly=np.array([False, True]))
    table = with_prediction(block(["id", "x"], [["a", "1"], ["b", "2"]]), scored)
    assert table.header[:5] == ["id", "x", "mean", "variance", "std"]
    assert table.header[5:] == ["lower", "upper", "standard_error", "score", "p_value", "is_anomaly"]
    assert table.rows[1] == ["b", "2", 1, 2, 3, 4, 5, 6, 2, 0.001, "true"]


def test_the_table_of_a_calibrated_model_says_which_noise_is_in_it_and_what_the_interval_claims() -> None:
    rows = block(["x"], [["1"], ["2"]])
    for known in (prediction(), replace(prediction(), aleatoric=np.array([[0.5], [0.25]]))):
        plain, table = (with_prediction(rows, known, calibrated=kept) for kept in (False, True))
        assert set(table.header) - set(plain.header) == {"aleatoric", "interval_kind"}
        cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        assert [row["interval_kind"] for row in cells] == ["credible"] * 2
        noise = [None, None] if known.aleatoric is None else known.aleatoric[:, 0].tolist()
        assert [row["aleatoric"] for row in cells] == noise


def test_several_outputs_are_numbered_and_the_unknown_is_empty() -> None:
    table = with_prediction(block(["x"], [["1"], ["2"]]), prediction(outputs=2))
    assert table.header[1:5] == ["mean_0", "mean_1", "variance_0", "variance_1"]
    assert table.rows[0][-3:] == [None, None, None]
    assert table.rows[0][1:3] == [0, 1]


def test_outputs_of_several_axes_are_no_table() -> None:
    dense = replace(prediction(), mean=np.zeros((2, 3, 4)))
    with pytest.raises(InputError, match=r"outputs of a row have the shape \(3, 4\), .* use mcdrop in Python"):
        with_prediction(block(["x"], [["1"], ["2"]]), dense)


def test_classification_columns() -> None:
    classes = prediction(outputs=2, label=np.array([1, 0]), entropy=np.ones(2), mutual_information=np.zeros(2))
    header = with_prediction(block(["x"], [["1"], ["2"]]), classes).header
    assert header[1:4] == ["label", "probability_0", "probability_1"]
    assert header[-5:] == ["entropy", "mutual_information", "score", "p_value", "is_anomaly"]


def test_a_calibrated_classifier_says_which_classes_are_in_its_sets() -> None:
    known: dict[str, Any] = {"label": np.array([1, 0]), "entropy": np.ones(2), "mutual_information": np.zeros(2)}
    sets, chances = np.array([[True, False], [True, True]]), np.array([[0.8, 0.2], [0.5, 0.5]])
    rows = block(["x"], [["1"], ["2"]])
    table = with_prediction(rows, prediction(outputs=2, prediction_set=sets, probabilities=chances, **known))
    cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [[row[f"in_set_{i}"] for i in range(2)] for row in cells] == [["true", "false"], ["true", "true"]]
    assert [[row[f"calibrated_{i}"] for i in range(2)] for row in cells] == chances.tolist()
    more = {"in_set_0", "in_set_1", "calibrated_0", "calibrated_1"}
    plain = with_prediction(rows, prediction(outputs=2, **known)).header
    assert plain == [name for name in table.header if name not in more]


def test_a_column_of_the_same_name_is_never_written_twice() -> None:
    mine = block(["x", "mean"], [["1", "5"], ["2", "6"]])
    with pytest.raises(InputError, match="already has columns 'mean'"):
        with_prediction(mine, prediction())
    assert with_prediction(mine, prediction(), prefix="new_").header[:3] == ["x", "mean", "new_mean"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    cells = [["1", 'a "quote", and\na line'], ["2", "naïve"]]
    target = tmp_path / "out.csv"
    assert write_rows(target, [Table(["x", "note"], cells), Table(["x", "note"], [["0.1", ""]])]) == 3
    with target.open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [["x", "note"], *cells, ["0.1", ""]]


def test_a_carriage_return_in_a_cell_ends_no_row(tmp_path: Path) -> None:
    """Python's own writer leaves it bare before 3.13, and any reader then sees two rows."""
    rows = [["a\rheader", "x"], ["one\rtwo", "1"], ["\r", "2"], ["three\r\nfour\r\n", "3"]]
    write_rows(tmp_path / "out.csv", [Table(rows[0], rows[1:])])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == rows
    again = only(tmp_path / "out.csv", width=1, features=["x"])
    assert [again.header, *again.cells] == rows
    assert (tmp_path / "out.csv").read_bytes().endswith(b'\r\n",3\n')  # rows end with a newline alone, as ever


def test_a_float_survives_the_round_trip(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.csv", [Table(["x"], [[0.1 + 0.2], [1e-300]])])
    assert (tmp_path / "out.csv").read_text() == "x\n0.30000000000000004\n1e-300\n"


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")

    def failing() -> Iterator[Table]:
        yield Table(["x"], [["1"]])
        raise InputError("in the middle")

    with pytest.raises(InputError, match="in the middle"):
        write_rows(target, failing())
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real.csv")
    write_rows(tmp_path / "link", [Table(["x"], [["1"]])])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "x\n1\n"
    write_rows("/dev/null", [Table(["x"], [["1"]])])
    assert Path("/dev/null").is_char_device()


def test_a_pipe_is_written_where_it_is() -> None:
    """As the shell gives it: ``-o /dev/stdout | ...`` and ``-o >(gzip > out.gz)`` lead to no path of a file."""
    reader, writer = os.pipe()
    check_place(f"/dev/fd/{writer}")
    write_rows(f"/dev/fd/{writer}", [Table(["x"], [["1"]])])
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == "x\n1\n"


def test_a_file_that_somebody_has_open_is_not_replaced(tmp_path: Path) -> None:
    """As in ``-o /dev/stdout >> all.csv``: what stands in it, and what others write to it, would be lost."""
    (tmp_path / "all.csv").write_text("old\n")
    with (tmp_path / "all.csv").open("a") as opened:
        place = f"/dev/fd/{opened.fileno()}"
        for write in (check_place, lambda target: write_rows(target, [])):
            with pytest.raises(InputError, match="is open already, and would be replaced"):
                write(place)
    assert (tmp_path / "all.csv").read_text() == "old\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*no/out.csv: No such file"):
        write_rows(tmp_path / "no" / "out.csv", [])
    with pytest.raises(InputError, match="Is a directory"):
        write_rows(tmp_path, [])
