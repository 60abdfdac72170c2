"""Rows and arrays beside them as one safetensors file."""

from collections.abc import Mapping, Sequence
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


def read_rows(data: bytes, name: str, inputs: Sequence[tuple[str, bool]]) -> tuple[Rows, dict[str, Any]]:
    """Gives the rows, their leaves in the order of the inputs, and the other arrays of what ``write_rows`` wrote.

    Args:
        data: the content of the file.
        name: of the file, for what is said of it.
        inputs: the name of each, and whether it goes by position; the file itself knows no order but that of names.

    Raises:
        ArtifactError: it is no such file, or does not hold these inputs.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{name} is not a safetensors file: {error}") from error
    leaves = {key.removeprefix(_INPUT): value for key, value in arrays.items() if key.startswith(_INPUT)}
    keys = [str(i) if by_position else one for i, (one, by_position) in enumerate(inputs)]
    if sorted(keys) != sorted(leaves):
        raise ArtifactError(f"{name} holds the inputs {sorted(leaves)}, its manifest lists {sorted(keys)}")
    args = tuple(leaves[key] for key, (_, by_position) in zip(keys, inputs, strict=True) if by_position)
    if 0 < len(args) < len(keys):
        raise ArtifactError(f"{name} mixes inputs by position and by name")
    more = {key: value for key, value in arrays.items() if not key.startswith(_INPUT)}
    return Rows.of(args or {key: leaves[key] for key in keys}), more
