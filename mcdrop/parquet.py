"""Parquet files: columns as numbers, some rows at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, MissingExtra
from mcdrop.wholes import digits_of

__all__ = ["batches", "open_parquet", "picked"]

_ROWS = 65_536  # at a time, at most


def open_parquet(source: str | Path) -> Any:
    """Gives an open file, as pyarrow has it.

    Raises:
        InputError: it cannot be read, or is no Parquet.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "table") from None
    try:
        file = parquet.ParquetFile(source)
        file.schema_arrow.names  # noqa: B018 -- names that are not UTF-8 are an error where they are read
        return file
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: that of the names
        raise InputError(f"cannot read {source} as Parquet: {error}") from None


def batches(file: Any, source: str | Path, names: Sequence[str] | None = None, *, chunk: int = _ROWS) -> Iterator[Any]:
    """Gives the rows of an open file, ``chunk`` at a time at most.

    Raises:
        InputError: they are damaged, or cannot be read.
    """
    import pyarrow

    try:
        yield from file.iter_batches(batch_size=min(chunk, _ROWS), columns=names and [*names])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {source}: {error}") from None


def picked(
    source: str | Path, names: Sequence[str], dtype: str, *, chunk: int = _ROWS
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Gives named columns of a file as numbers, with the number of rows read so far; ``chunk`` at a time at most.

    Raises:
        InputError: there are no rows, two columns of a name, or cells that are no numbers of this ``dtype``.
    """
    file, start = open_parquet(source), 0
    header = file.schema_arrow.names
    if twice := [name for name in names if header.count(name) > 1]:
        raise InputError(f"{source} has a column {twice[0]!r} more than once, so it is not clear which one to use")
    for batch in batches(file, source, names, chunk=chunk):
        columns = [_column(batch, name, np.dtype(dtype), source, start) for name in names]
        start += len(batch)
        yield start, np.stack(columns, axis=1)
    if not start:
        raise InputError(f"{source} holds no rows; give at least one row")


def _column(batch: Any, name: str, dtype: np.dtype[Any], source: str | Path, start: int) -> NDArray[Any]:
    """One column of some rows that begin at ``start``; as strict as for a CSV file."""
    import pyarrow

    values, real = batch.column(batch.schema.get_field_index(name)), dtype.kind == "f"
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        wide = values.cast(pyarrow.float64(), safe=real).to_numpy(zero_copy_only=False)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        raise InputError(
            f"{source}, column {name!r} holds {values.type}, not numbers that a float64 can hold"
        ) from None
    if (exact := _exact(values, dtype)) is not None:
        return exact
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[Any] = wide.astype(dtype)
    wrong = ~np.isfinite(found) | (~np.isfinite(wide) if real else found != wide)
    floats = pyarrow.types.is_floating(values.type)
    digits = digits_of(np.dtype(values.type.to_pandas_dtype()).name if floats else "float64")
    rounded = ~wrong & (not real) & (np.abs(wide) >= 2.0**digits)
    for rows, problem in (
        (wrong & ~np.isfinite(wide), "is empty or not a finite number"),
        (wrong, f"holds {{}}, but the model takes {dtype}"),
        (rounded, f"holds {{}} as a float, which from 2**{digits} on may be rounded; store the column as {dtype}"),
    ):
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            raise InputError(f"{source}, row {start + row}, column {name!r} {problem.format(float(wide[row]))}")
    return found


def _exact(values: Any, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Whole numbers that never were floats; None where they were, or where the other way has the words for what is."""
    import pyarrow

    if dtype.kind not in "iu" or values.null_count or pyarrow.types.is_floating(values.type):
        return None
    try:
        found: NDArray[Any] = values.cast(pyarrow.from_numpy_dtype(dtype)).to_numpy(zero_copy_only=False)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return None
    return found
