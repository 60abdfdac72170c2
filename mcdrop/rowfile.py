"""Rows and arrays beside them as one safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import ArtifactError
from mcdrop.rows import Rows

__all__ = ["as_array", "read_rows", "write_rows"]

_INPUT = "input."


def write_rows(path: Path, rows: Rows, more: Mapping[str, Any]) -> None:
    """Writes the leaves of rows under their names or positions, and more arrays under theirs."""
    from safetensors.numpy import save_file

    leaves = {f"{_INPUT}{name}": as_array(leaf) for name, leaf in rows.named()}
    save_file({**leaves, **{name: np.ascontiguousarray(value) for name, value in more.items()}}, str(path))


def as_array(leaf: Any) -> NDArray[Any]:
    """Gives a leaf of rows as an array; what numpy has no type for, such as bfloat16, as float32."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        try:
            leaf = leaf.numpy()
        except TypeError:
            leaf = leaf.float().numpy()
    return np.ascontiguousarray(leaf)


def read_rows(path: Path, positional: int) -> tuple[Rows, dict[str, Any]]:
    """Gives the rows, of which so many leaves go by position, and the other arrays.

    Raises:
        ArtifactError: it is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error
    leaves = {key.removeprefix(_INPUT): value for key, value in arrays.items() if key.startswith(_INPUT)}
    args = tuple(leaves.pop(str(i)) for i in range(positional))
    more = {key: value for key, value in arrays.items() if not key.startswith(_INPUT)}
    return Rows.of(args or leaves), more
