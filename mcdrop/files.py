"""Files of rows, CSV or Parquet by their suffix: read in blocks, and written again with new columns at the right."""

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, MissingExtra
from mcdrop.table import Block, Table, read_rows, write_rows

if TYPE_CHECKING:
    from mcdrop.model import InputSpec, Model

__all__ = ["Advance", "append_columns", "only_input", "read_inputs", "read_targets", "size_of"]

Advance = Callable[[int], None]

_PARQUET = (".parquet", ".pq")
_ROWS = 65_536  # of a Parquet file at a time


def read_inputs(
    model: "Model", source: str | Path, *, without: Sequence[str] = (), advance: Advance | None = None
) -> Iterator[NDArray[Any]]:
    """Gives what a model reads of a file, block by block: (n, F), or as its input is shaped.

    ``without`` are columns that are not inputs, such as targets; where the model names no columns, all others are.
    ``advance`` is told how much of ``size_of`` the file is done.

    Raises:
        InputError: the model takes several inputs, or the file does not hold what it reads.
    """
    shape = only_input(model).shape[1:]
    blocks = _parquet_blocks if _is_parquet(source) else _csv_blocks
    for position, values in blocks(model, source, without):
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
        return np.concatenate([values for _, values in _picked(source, names, "float64")])
    return np.concatenate(
        [block.values for block in read_rows(source, width=len(names), features=names, dtype="float64")]
    )


def append_columns(model: "Model", source: str | Path, target: str | Path, columns: Mapping[str, NDArray[Any]]) -> int:
    """Writes a file again with further columns (N,) at its right, and gives the number of rows.

    Raises:
        InputError: the formats differ, or the file already has a column of such a name.
    """
    if _is_parquet(source) != _is_parquet(target):
        raise InputError(f"{target} must have the format of {source}: both CSV, or both with the suffix .parquet")
    header = _header(source)
    if taken := [name for name in columns if name in header]:
        raise InputError(f"the table already has a column {taken[0]!r}; choose a prefix for the new ones")
    if _is_parquet(source):
        return _append_parquet(source, Path(target), columns)
    return write_rows(target, _appended(_csv_source(model, source, ()), columns))


def size_of(source: str | Path) -> int | None:
    """Gives what ``advance`` counts up to: bytes of a CSV file, rows of a Parquet file; None where it is not known."""
    if _is_parquet(source):
        return int(_open_parquet(source).metadata.num_rows)
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


def _header(source: str | Path) -> list[str]:
    """The names of the columns; of a CSV file its first line, be it names or not."""
    if _is_parquet(source):
        return list(_open_parquet(source).schema_arrow.names)
    try:
        with Path(source).open(encoding="utf-8-sig", newline="") as stream:
            return [cell.strip() for cell in next(csv.reader(stream), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None


def _features(model: "Model", source: str | Path, without: Sequence[str]) -> list[str] | None:
    if model.features is not None or not without:
        return model.features
    return [name for name in _header(source) if name not in without]


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv_source(model: "Model", source: str | Path, without: Sequence[str]) -> Iterator[Block]:
    spec, features = only_input(model), _features(model, source, without)
    return read_rows(source, width=math.prod(spec.shape[1:]), features=features, dtype=spec.dtype)


def _csv_blocks(model: "Model", source: str | Path, without: Sequence[str]) -> Iterator[tuple[int, NDArray[Any]]]:
    return ((block.position, block.values) for block in _csv_source(model, source, without))


def _appended(blocks: Iterator[Block], columns: Mapping[str, NDArray[Any]]) -> Iterator[Table]:
    start = 0
    for block in blocks:
        stop = start + len(block.cells)
        new = [[_cell(value) for value in values[start:stop].tolist()] for values in columns.values()]
        yield Table(
            [*block.header, *columns], [[*cells, *more] for cells, *more in zip(block.cells, *new, strict=True)]
        )
        start = stop


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _open_parquet(source: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "table") from None
    try:
        return parquet.ParquetFile(source)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"cannot read {source} as Parquet: {error}") from None


def _parquet_blocks(model: "Model", source: str | Path, without: Sequence[str]) -> Iterator[tuple[int, NDArray[Any]]]:
    spec, names = only_input(model), _features(model, source, without) or _header(source)
    width, header = math.prod(spec.shape[1:]), _header(source)
    if missing := [name for name in names if name not in header]:
        raise InputError(f"{source} lacks the column {missing[0]!r}; the model takes {', '.join(names[:20])}")
    if len(names) != width:
        raise InputError(f"{source} must have {width} columns that the model reads, got {len(names)}")
    return _picked(source, names, spec.dtype)


def _picked(source: str | Path, names: Sequence[str], dtype: str) -> Iterator[tuple[int, NDArray[Any]]]:
    """Named columns of a Parquet file as numbers, with the number of rows read so far."""
    import pyarrow

    start = 0
    for batch in _open_parquet(source).iter_batches(batch_size=_ROWS, columns=list(names)):
        columns = []
        for name in names:
            values = batch.column(batch.schema.get_field_index(name))
            try:
                wide = values.cast(pyarrow.float64()).to_numpy(zero_copy_only=False)
            except pyarrow.ArrowInvalid:
                raise InputError(f"{source}, column {name!r} holds {values.type}, not numbers") from None
            if not np.isfinite(wide).all():
                row = start + int(np.flatnonzero(~np.isfinite(wide))[0])
                raise InputError(f"{source}, row {row}, column {name!r} is empty or not a finite number")
            columns.append(wide)
        start += len(batch)
        yield start, np.stack(columns, axis=1).astype(dtype)


def _append_parquet(source: str | Path, target: Path, columns: Mapping[str, NDArray[Any]]) -> int:
    """Written beside and renamed, so that the file appears whole or not at all."""
    import pyarrow
    import pyarrow.parquet as parquet

    beside, start, writer = target.with_name(f".{target.name[:64]}.{os.getpid()}.part"), 0, None
    try:
        for batch in _open_parquet(source).iter_batches(batch_size=_ROWS):
            table, stop = pyarrow.Table.from_batches([batch]), start + len(batch)
            for name, values in columns.items():
                table = table.append_column(name, pyarrow.array(values[start:stop]))
            writer = writer or parquet.ParquetWriter(beside, table.schema)
            writer.write_table(table)
            start = stop
        if writer is not None:
            writer.close()
            beside.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)
    return start
