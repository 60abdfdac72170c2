"""A state dict that torch pickled, as safetensors: read with ``weights_only``, which runs no code of the file."""

import io
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from mcdrop.barefile import read_plain
from mcdrop.errors import ArtifactError, InputError
from mcdrop.streams import whole

__all__ = ["convert"]

_NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights


def convert(source: str | Path, target: str | Path, *, sha256: str | None = None) -> int:
    """Writes the weights of a ``.pth`` file as safetensors, and gives their number; tied weights are written twice.

    Raises:
        ArtifactError: the file holds more than tensors, none at all, or one that safetensors cannot hold.
        InputError: the target cannot be written.
    """
    data = read_plain(Path(source), sha256=sha256)
    try:
        read = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # nothing of it was run, so whatever torch stumbles over is in the file
        reason = _unsafe(data) or "it is damaged, or torch.save did not write it"  # torch's own advice is to run it
        raise ArtifactError(f"{source} is not a plain state dict: {reason}") from None
    del data  # it is as large as the weights, which are there twice when they are written
    read = read if isinstance(read, Mapping) else {}
    weights = next((read[name] for name in _NESTED if isinstance(read.get(name), Mapping)), read)
    tensors = {str(name): value.detach() for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(weights):
        raise ArtifactError(f"{source} does not hold a state dict, that is, tensors by name")
    for name, tensor in tensors.items():
        if reason := _unfit(name, tensor):
            raise ArtifactError(f"{source} cannot be written as safetensors: the tensor {name!a} {reason}")
    try:
        with whole(target) as beside:
            _write(beside, {name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    except SafetensorError as error:
        raise InputError(f"cannot write {target}: {error}") from None
    return len(tensors)


def _write(place: Path, tensors: dict[str, Tensor]) -> None:
    """Writes into a file and leaves its mode as it is, or into a pipe."""
    status = place.stat()
    if stat.S_ISREG(status.st_mode):
        save_file(tensors, place)  # holds none of it again, and puts a file that its owner alone may read in its place
        place.chmod(stat.S_IMODE(status.st_mode))
    else:
        place.write_bytes(save(tensors))


def _unfit(name: str, tensor: Tensor) -> str:
    """Why safetensors cannot hold a tensor under its name; nothing where it can."""
    if name == "__metadata__":
        return "has the one name that the format keeps for itself; rename it"
    if tensor.is_meta:
        return "is on the device meta, so it has no values; save the network with its weights"
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"of {tensor.layout}"
        return f"is {kind}; save it dense"
    try:
        save({name: torch.empty(0, dtype=tensor.dtype)})
    except UnicodeEncodeError:
        return "has a name that is not text; rename it"
    except KeyError:
        return f"is of {tensor.dtype}; save it as another type"
    return ""


def _unsafe(data: bytes) -> str:
    """What a file would import, where torch can tell."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # a file that is damaged as well
        return ""
    names = ", ".join(sorted(found)[:5])
    return f"it would import {names}; save network.state_dict() instead of the network" if found else ""
