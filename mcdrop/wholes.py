"""Whole numbers as inputs, such as ids: never cut off, wrapped around or rounded on their way through a float."""

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError

__all__ = ["INEXACT", "cell_problem", "check_whole", "digits_of", "is_whole", "read_whole"]

INEXACT = 2**53  # from here on a float of 64 bits may stand for several whole numbers


def is_whole(kind: np.dtype[Any]) -> bool:
    """Says whether a type holds whole numbers, or truth values, alone."""
    return kind.kind in "iub"


def check_whole(values: NDArray[Any], kind: np.dtype[Any], name: str, given: str = "") -> None:
    """Refuses what would be cut off or wrap around in a type of whole numbers, or of truth values.

    ``given`` names the type that the values came in, where it is not theirs.

    Raises:
        InputError: there is such a number, or a float that may be a rounded one.
    """
    if np.can_cast(values.dtype, kind):
        return
    real, given = values.dtype.kind == "f", given or values.dtype.name
    if real:
        cut = values[values != np.floor(values)]
        if cut.size:
            raise InputError(f"input {name!r} must be whole numbers, got {cut[0]!s}")
        values = values.astype(np.promote_types(values.dtype, np.float64), copy=False)
    low, high = _limits(kind)
    # not "> high": the largest 64-bit number is no float64, and would round up to the first one that is too large
    outside = values[(values < low) | (values >= high + 1)]
    if outside.size:
        raise InputError(f"input {name!r} must be whole numbers from {low} to {high} ({kind}), got {outside[0].item()}")
    if real and (rounded := values[np.abs(values) >= 2 ** (bits := digits_of(given))]).size:
        raise InputError(
            f"input {name!r} must be whole numbers, got {rounded[0]!s} as a {given}, which from 2**{bits} on may be "
            "rounded; give whole numbers alone"
        )


def digits_of(kind: str) -> int:
    """How many bits of a whole number a type of real numbers holds."""
    return 8 if kind == "bfloat16" else int(np.finfo(kind).nmant) + 1  # numpy has no bfloat16


def read_whole(cells: list[list[str]], kind: np.dtype[Any]) -> NDArray[Any] | None:
    """Reads rows of cells that all are whole numbers of a type; None where one is not."""
    limits = low, high = _limits(kind)
    with suppress(ValueError):  # numpy reads a block at once, many times as fast, but only as floats
        real = np.array(cells, dtype=np.float64)
        inside = (real >= low) & (real <= high) & (np.abs(real) < INEXACT)
        if (inside & (real == np.floor(real))).all() and not any("_" in cell for row in cells for cell in row):
            return real.astype(kind)
    found = [[_whole(cell, limits) for cell in row] for row in cells]
    return None if any(None in row for row in found) else np.array(found, dtype=kind)


def cell_problem(cell: str, kind: np.dtype[Any]) -> str | None:
    """Says what is wrong with a number that is finite, where it is no whole number of a type."""
    limits = low, high = _limits(kind)
    if _whole(cell, limits) is not None:
        return None
    if _digits(cell) is None and float(cell).is_integer() and low <= float(cell) <= high:
        return "which may be rounded; write all its digits, without a point or an exponent"
    return f"but the model takes {kind}"


def _whole(cell: str, limits: tuple[int, int]) -> int | None:
    found = _digits(cell)
    if found is None:
        try:
            number = float(cell)  # 1.0 and 1e3 are whole too
        except ValueError:
            return None
        found = int(number) if "_" not in cell and number.is_integer() and abs(number) < INEXACT else None
    return found if found is not None and limits[0] <= found <= limits[1] else None


def _digits(cell: str) -> int | None:
    try:
        return None if "_" in cell else int(cell)  # Python's own 1_000 is text
    except ValueError:
        return None


def _limits(kind: np.dtype[Any]) -> tuple[int, int]:
    return (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
