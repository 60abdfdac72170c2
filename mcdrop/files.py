"""Files of rows, CSV or Parquet by their suffix: read in blocks, and written again with new columns at the right."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError
from mcdrop.parquet import batches, open_parquet, picked
from mcdrop.rows import check_named
from mcdrop.streams import check_place, explained, reading, whole
from mcdrop.table import CELLS_PER_BLOCK, Block, Table, read_records, read_rows, write_rows

if TYPE_CHECKING:
    from mcdrop.model import InputSpec, Model

__all__ = [
    "Advance",
    "Note",
    "append_columns",
    "check_target",
    "only_input",
    "read_inputs",
    "read_pairs",
    "read_targets",
    "rows_at_once",
    "size_of",
    "state_of",
]

Advance = Callable[[int], None]
Note = Callable[[str], None]
State = tuple[int, int, int]

_PARQUET = (".parquet", ".pq")
_COLUMNS = 7  # at most: those that a table of predictions has for each output, and those besides
_KEPT_PER_BLOCK = 1 << 22  # numbers of passes that are kept, and then sorted in double precision


def read_inputs(
    model: "Model",
    source: str | Path,
    *,
    without: Sequence[str] = (),
    advance: Advance | None = None,
    note: Note | None = None,
) -> Iterator[NDArray[Any]]:
    """Gives what a model reads of a file, block by block: (n, F), or as its input is shaped.

    ``without`` are columns that are not inputs, such as targets; where the model names no columns, all others are.
    ``advance`` is told how much of ``size_of`` the file is done, ``note`` that a CSV file has no header.

    Raises:
        InputError: the model takes several inputs, or the file does not hold what it reads.
    """
    shape = only_input(model).shape[1:]
    chunk = rows_at_once(model, {})
    if _is_parquet(source):
        blocks = _parquet_blocks(model, source, without, chunk)
    else:
        blocks = ((block.position, block.values) for block in _csv_source(model, source, without, note, chunk))
    for position, values in blocks:
        yield values.reshape(-1, *shape)
        if advance is not None:
            advance(position)


def read_targets(source: str | Path, names: Sequence[str]) -> NDArray[np.float64]:
    """Gives named columns as numbers, (N, len(names)).

    Raises:
        InputError: a column is not there, or a cell of it is not a finite number.
    """
    header = _header(source)
    if missing := [name for name in names if name not in header]:
        raise InputError(f"{source} has no column {missing[0]!r}; its columns are {', '.join(header[:20])}")
    if _is_parquet(source):
        return np.concatenate([values for _, values in picked(source, names, "float64")])
    return np.concatenate(
        [block.values for block in read_rows(source, width=len(names), features=names, dtype="float64")]
    )


def read_pairs(
    model: "Model", source: str | Path, targets: Sequence[str], *, advance: Advance | None = None
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Gives what a model reads of a file and its true values, row by row; for that the file is read twice.

    Raises:
        InputError: as for ``read_inputs`` and ``read_targets``, or the file has changed meanwhile.
    """
    since = state_of(source)
    y = read_targets(source, targets)
    x = np.concatenate([*read_inputs(model, source, without=targets, advance=advance)])
    _check_same(source, len(x), {"": y}, since)
    return x, y


def append_columns(
    model: "Model",
    source: str | Path,
    target: str | Path,
    columns: Mapping[str, NDArray[Any]],
    *,
    since: State | None = None,
) -> int:
    """Writes a file again with further columns (N,) at its right, and gives the number of rows.

    Raises:
        InputError: as for ``check_target``; or the file does not have N rows, or not the ``state_of`` that it had then.
    """
    check_target(source, target, [*columns])
    if _is_parquet(source):
        return _append_parquet(source, target, columns, since)
    return write_rows(target, _appended(_csv_source(model, source, ()), source, columns, since))


def check_target(source: str | Path, target: str | Path, names: Sequence[str]) -> None:
    """Checks that a file can be written again with further columns, before these are computed.

    Raises:
        InputError: the formats differ, the file already has a column of such a name, or the target cannot be written.
    """
    if _is_parquet(source) != _is_parquet(target):
        raise InputError(f"{target} must have the format of {source}: both CSV, or both with the suffix .parquet")
    header = _header(source)
    if taken := [name for name in names if name in header]:
        raise InputError(f"the table already has a column {taken[0]!r}; choose a prefix for the new ones")
    check_place(target)


def state_of(source: str | Path) -> State:
    """Gives what differs when a file was written again or replaced."""
    with explained("read", source):
        found = Path(source).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_same(source: str | Path, rows: int, columns: Mapping[str, NDArray[Any]], since: State | None) -> None:
    """Refuses a file that is not the one that the columns were made from."""
    if any(len(values) != rows for values in columns.values()) or since not in (None, state_of(source)):
        raise InputError(f"{source} has changed while it was read; try again when nothing writes to it")


def size_of(source: str | Path) -> int | None:
    """Gives what ``advance`` counts up to: bytes of a CSV file, rows of a Parquet file; None where it is not known."""
    if _is_parquet(source):
        return int(open_parquet(source).metadata.num_rows)
    return Path(source).stat().st_size if Path(source).is_file() else None


def _is_parquet(source: str | Path) -> bool:
    return Path(source).suffix.lower() in _PARQUET


def only_input(model: "Model") -> "InputSpec":
    """Gives the one input of a model that can read tables.

    Raises:
        InputError: it takes several.
    """
    if len(model.inputs) != 1:
        names = ", ".join(spec.name for spec in model.inputs)
        raise InputError(f"the model takes several inputs ({names}) and a table gives one; use mcdrop in Python")
    return model.inputs[0]


def rows_at_once(model: "Model", options: Mapping[str, Any]) -> int:
    """Gives how many rows of a file may be predicted at once, so that what comes of them fits in memory as they do.

    ``options`` are those of ``predict``; what is None is the model's default.

    Raises:
        InputError: an option outside its range.
    """
    asked = replace(model.defaults, **{name: value for name, value in options.items() if value is not None})
    try:
        outputs = int(model.backend.deterministic(model.example.take(slice(0, 2)))[0].size)
    except InputError:  # of a network that is built for one number of rows, which cannot be cut
        return sys.maxsize
    rows = CELLS_PER_BLOCK // (_COLUMNS * (outputs + 1))
    if asked.plan_with(model.calibration).keep_samples:
        rows = min(rows, _KEPT_PER_BLOCK // (asked.passes * outputs))
    return max(1, rows)


def _header(source: str | Path) -> list[str]:
    """The names of the columns; of a CSV file its first line, be it names or not."""
    if _is_parquet(source):
        return list(open_parquet(source).schema_arrow.names)
    with reading(source) as stream:
        _, cells = next(read_records(stream, str(source)), (0, []))
    return [cell.strip() for cell in cells]


def _features(model: "Model", source: str | Path, without: Sequence[str]) -> list[str] | None:
    if not without:
        return model.features
    header = _header(source)
    if model.features is not None:  # by place, the targets themselves would be read
        check_named([name.strip() for name in model.features], header, str(source))
        return model.features
    left = [name for name in header if name not in without]
    if not left:
        raise InputError(f"{source} has no columns beside {', '.join(without)}; the model needs some to read")
    return left


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv_source(
    model: "Model", source: str | Path, without: Sequence[str], note: Note | None = None, chunk: int | None = None
) -> Iterator[Block]:
    spec, features = only_input(model), _features(model, source, without)
    width = math.prod(spec.shape[1:])
    return read_rows(source, width=width, features=features, dtype=spec.dtype, chunk=chunk, note=note)


def _appended(
    blocks: Iterator[Block], source: str | Path, columns: Mapping[str, NDArray[Any]], since: State | None
) -> Iterator[Table]:
    start = 0
    for block in blocks:
        stop = start + len(block.cells)
        new = [[_cell(value) for value in values[start:stop].tolist()] for values in columns.values()]
        rows = [[*cells, *more] for cells, *more in zip(block.cells, *new, strict=False)]  # too many are refused below
        yield Table([*block.header, *columns], rows)
        start = stop
    _check_same(source, start, columns, since)


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _parquet_blocks(
    model: "Model", source: str | Path, without: Sequence[str], chunk: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    spec, names = only_input(model), _features(model, source, without) or _header(source)
    width, header = math.prod(spec.shape[1:]), _header(source)
    check_named(names, header, str(source))
    if len(names) != width:
        raise InputError(f"{source} must have {width} columns that the model reads, got {len(names)}")
    return picked(source, names, spec.dtype, chunk=chunk)


def _append_parquet(
    source: str | Path, target: str | Path, columns: Mapping[str, NDArray[Any]], since: State | None
) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    file, start = open_parquet(source), 0
    _check_same(source, file.metadata.num_rows, columns, since)
    schema = file.schema_arrow
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    for name, array in arrays.items():
        schema = schema.append(pyarrow.field(name, array.type))
    with whole(target) as beside, parquet.ParquetWriter(beside, schema) as writer:
        for batch in batches(file, source):
            table, stop = pyarrow.Table.from_batches([batch]), start + len(batch)
            for name, array in arrays.items():
                table = table.append_column(name, array[start:stop])
            writer.write_table(table)
            start = stop
        _check_same(source, start, columns, since)
    return start
