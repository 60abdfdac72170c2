"""Tables: CSV rows in and CSV rows out, block by block, so that a file of any length fits in memory.

What the model needs is picked by column name or by position; every other column is carried through untouched.
"""

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError
from mcdrop.rows import check_named, check_spelling, listed
from mcdrop.streams import STANDARD_STREAM, reading, writing
from mcdrop.wholes import cell_problem, is_whole, read_whole

if TYPE_CHECKING:
    from mcdrop.predict import Prediction

__all__ = ["CELLS_PER_BLOCK", "Block", "Table", "read_records", "read_rows", "with_prediction", "write_rows"]

CELLS_PER_BLOCK = 1 << 16  # a block of rows holds about this many cells, whatever the width of the table
MAX_LINE = 1 << 24  # characters; a longer line is a sign that the file is no table
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # of the process; Python's own is smaller than some texts


@dataclass(frozen=True)
class Block:
    """Some rows as they stood in the file, and as numbers (N, F); ``position``: bytes of the file read, or 0."""

    header: list[str]
    cells: list[list[str]]
    values: NDArray[Any]
    position: int = 0


@dataclass(frozen=True)
class Table:
    """Some rows to be written: names of the columns, and one list per row."""

    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class _Layout:
    """Where the model's columns are; ``named`` says that the first row is a header."""

    header: list[str]
    picked: list[int]
    named: bool


class _Lines:
    """Takes the lines of a csv writer, which end with both characters, and writes them with a newline alone.

    Before Python 3.13 a carriage return in a cell is quoted only where lines end with one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        self._stream.write(line.removesuffix("\r\n") + "\n")


def read_rows(
    source: str | Path,
    *,
    width: int,
    features: Sequence[str] | None = None,
    dtype: str = "float32",
    chunk: int | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Block]:
    """Reads a CSV file (``-`` is standard input) in blocks of ``chunk`` rows at most.

    The model's ``width`` columns are found by the names in ``features`` where the header has them all, else by position
    where the table has just that many columns. The first row is a header if it holds those names, or no number at all;
    ``note`` is told where it is none, and where its names are not those that the model has.

    Raises:
        InputError: no rows, ragged rows, or a cell that is not a finite number of this ``dtype``; with line and column.
    """
    name = "standard input" if str(source) == STANDARD_STREAM else str(source)
    with reading(source) as stream:
        records = read_records(stream, name)
        first = next(records, None)
        if first is None:
            raise InputError(f"{name} is empty; give a header and at least one row")
        layout = _layout(first[1], width, features, name)
        if not layout.named:
            records = itertools.chain([first], records)
        if note is not None and (said := _said(layout, features or (), name)):
            note(said)
        size = min(chunk or CELLS_PER_BLOCK, max(1, CELLS_PER_BLOCK // len(layout.header)))
        batch = list(itertools.islice(records, size))
        if not batch:
            raise InputError(f"{name} holds a header and no rows; give at least one row")
        while batch:
            values = _numbers(batch, layout, np.dtype(dtype), name)
            yield Block(layout.header, [cells for _, cells in batch], values, _position(stream))
            batch = list(itertools.islice(records, size))


def write_rows(target: str | Path, tables: Iterable[Table]) -> int:
    """Writes tables one below the other under the header of the first (``-`` is standard output); gives the row count.

    A file appears whole or not at all: it is written beside its place and renamed when the last row is in it.
    """
    count = 0
    with writing(target) as stream:
        writer = csv.writer(_Lines(stream), lineterminator="\r\n")
        for table in tables:
            if not count:
                writer.writerow(table.header)
            writer.writerows(table.rows)
            count += len(table.rows)
    return count


def with_prediction(block: Block, prediction: "Prediction", *, prefix: str = "", calibrated: bool = False) -> Table:
    """Gives the columns of the table followed by those of the prediction; what is unknown is an empty cell.

    Those of a model that keeps a calibration (``calibrated``) say whether it holds: which noise is in the variance,
    and what kind of claim the interval makes.

    Raises:
        InputError: the table already has a column of such a name; another ``prefix`` avoids that.
    """
    columns = {prefix + name: values for name, values in _columns(prediction, calibrated)}
    if taken := [name for name in block.header if name.strip() in columns]:
        raise InputError(f"the table already has columns {listed(taken)}; choose a prefix for the new ones")
    rows = [[*cells, *new] for cells, *new in zip(block.cells, *columns.values(), strict=True)]
    return Table([*block.header, *columns], rows)


def _columns(prediction: "Prediction", calibrated: bool) -> Iterator[tuple[str, list[Any]]]:
    if prediction.mean.ndim != 2:
        shape = prediction.mean.shape[1:]
        raise InputError(f"the outputs of a row have the shape {shape}, and a table takes (D,); use mcdrop in Python")
    by_output: dict[str, NDArray[Any] | None]
    if prediction.label is not None:
        yield "label", prediction.label.tolist()
        by_output = {"probability": prediction.mean}
        by_row = {name: getattr(prediction, name) for name in ("entropy", "mutual_information")}
    else:
        by_output = {name: getattr(prediction, name) for name in ("mean", "variance", "std")}
        by_row = {}
    by_output |= {name: getattr(prediction, name) for name in ("lower", "upper", "standard_error")}
    if prediction.prediction_set is not None:  # a classifier's, with a calibration that holds for these passes
        by_output |= {"in_set": prediction.prediction_set, "calibrated": prediction.probabilities}
    if calibrated and prediction.label is None:
        by_output["aleatoric"] = prediction.aleatoric
    by_row |= {name: getattr(prediction, name) for name in ("score", "p_value", "is_anomaly")}
    rows, outputs = prediction.mean.shape
    for name, values in by_output.items():
        for i in range(outputs):
            suffix = "" if outputs == 1 else f"_{i}"
            yield name + suffix, _cells(None if values is None else values[:, i], rows)
    for name, values in by_row.items():
        yield name, _cells(values, rows)
    if calibrated:
        yield "interval_kind", [prediction.interval_kind] * rows


def _cells(values: NDArray[Any] | None, rows: int) -> list[Any]:
    if values is None:
        return [None] * rows
    return [*(np.where(values, "true", "false") if values.dtype == bool else values).tolist()]


def _layout(first: list[str], width: int, features: Sequence[str] | None, name: str) -> _Layout:
    titles = [cell.strip() for cell in first]
    wanted = [feature.strip() for feature in features or ()]
    missing = [feature for feature in wanted if feature not in titles]
    if wanted and not missing:
        if twice := [feature for feature in wanted if titles.count(feature) > 1]:
            raise InputError(f"{name}: the header has {twice[0]!r} more than once, so it is not clear which one to use")
        if len(wanted) != width:
            raise InputError(f"{name} must have {width} columns that the model reads, got {len(wanted)}")
        return _Layout(first, [titles.index(feature) for feature in wanted], named=True)
    check_spelling(missing, [title for title in titles if title not in wanted], name)
    named = all(_number(title) is None for title in titles)
    if named and len(missing) < len(wanted):
        check_named(wanted, titles, name)
    if len(first) != width:
        raise InputError(f"{name} must have {width} columns, got {len(first)}{_remedy(first, wanted)}")
    return _Layout(first if named else wanted or [f"x_{i}" for i in range(width)], list(range(width)), named)


def _said(layout: _Layout, features: Sequence[str], name: str) -> str:
    """What whoever gave a table should hear of how it is read."""
    if not layout.named:
        return f"the first line of {name} holds numbers, so it is read as a row, not as the names of columns"
    titles = [title.strip() for title in layout.header]
    if not features or features[0].strip() in titles:
        return ""
    return f"{name} names none of the columns that the model reads, so they go by position: {listed(features)}"


def _remedy(first: list[str], wanted: list[str]) -> str:
    for character, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(first) == 1 and character in first[0]:
            return f"; it looks separated by {word}, separate it by commas"
    if wanted:
        return f"; name them in a header ({listed(wanted)}) or give no other column"
    return "; the model does not name its columns, so give no other column"


def read_records(stream: TextIO, name: str) -> Iterator[tuple[int, list[str]]]:
    """Gives (line number, cells) for each record; all have as many cells as the first, blank lines only at the end.

    Raises:
        InputError: they do not, it is no CSV text in UTF-8, or a line is longer than ``MAX_LINE``.
    """
    reader = csv.reader(_lines(stream, name), strict=True)
    width = blank = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{name}, line {reader.line_num}: {error}") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            blank = blank or reader.line_num
            continue
        if blank:
            raise InputError(f"{name}, line {blank} is blank but rows follow it; fill it or delete it")
        width = width or len(cells)
        if len(cells) != width:
            raise InputError(f"{name}, line {reader.line_num} must have {width} cells, got {len(cells)}")
        yield reader.line_num, cells


def _lines(stream: TextIO, name: str) -> Iterator[str]:
    for number in itertools.count(1):
        try:
            line = stream.readline(MAX_LINE)
        except UnicodeDecodeError:
            raise InputError(f"{name} is not UTF-8 text (near line {number}); save it as CSV in UTF-8") from None
        if not line:
            return
        if len(line) == MAX_LINE and line[-1] not in "\r\n":
            raise InputError(f"{name}, line {number} is longer than {MAX_LINE} characters; is this a CSV file?")
        yield line


def _numbers(batch: list[tuple[int, list[str]]], layout: _Layout, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    picked = [[cells[i] for i in layout.picked] for _, cells in batch]
    if (values := read_whole(picked, dtype) if is_whole(dtype) else _read_real(picked, dtype)) is not None:
        return values
    for (line, _), cells in zip(batch, picked, strict=True):
        for i, cell in zip(layout.picked, cells, strict=True):
            if problem := _problem(cell, dtype):
                raise InputError(f"{name}, line {line}, column {layout.header[i].strip()!r} {problem}")
    raise AssertionError("a cell that numpy refuses is one that _problem names")


def _read_real(cells: list[list[str]], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    try:
        with np.errstate(over="ignore"):
            values = np.array(cells, dtype=np.float64).astype(dtype)
    except ValueError:
        return None
    return values if np.isfinite(values).all() and not any("_" in cell for row in cells for cell in row) else None


def _problem(cell: str, dtype: np.dtype[Any]) -> str | None:
    shown = repr(cell if len(cell) <= 40 else cell[:40] + "...")
    number = _number(cell)
    if number is None:
        return f"holds {shown}, which is not a number" if cell.strip() else "is empty; every row needs a number there"
    if not np.isfinite(number):
        return f"holds {shown}, which is not a finite number"
    if is_whole(dtype):
        problem = cell_problem(cell, dtype)
    else:
        problem = f"which is too large for {dtype}" if _read_real([[cell]], dtype) is None else None
    return problem and f"holds {shown}, {problem}"


def _number(cell: str) -> float | None:
    """Reads a number as people write it: Python's own ``1_000`` is text."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _position(stream: TextIO) -> int:
    try:
        return stream.buffer.tell()
    except OSError:  # a pipe has no position
        return 0
