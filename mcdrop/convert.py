"""A state dict that torch pickled, as safetensors: read with ``weights_only``, which runs no code of the file."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mcdrop.barefile import read_plain
from mcdrop.errors import ArtifactError, InputError
from mcdrop.streams import whole

__all__ = ["convert"]

_NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights


def convert(source: str | Path, target: str | Path, *, sha256: str | None = None) -> int:
    """Writes the weights of a ``.pth`` file as safetensors, and gives their number; tied weights are written twice.

    Raises:
        ArtifactError: the file holds more than tensors, or none at all; the message names what.
        InputError: the target cannot be written.
    """
    data = read_plain(Path(source), sha256=sha256)
    try:
        read = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError):
        reason = _unsafe(data) or "it is damaged, or torch.save did not write it"  # torch's own advice is to run it
        raise ArtifactError(f"{source} is not a plain state dict: {reason}") from None
    inner = next((read[name] for name in _NESTED if isinstance(read, Mapping) and name in read), read)
    weights = inner if isinstance(inner, Mapping) else {}
    tensors = {str(name): value.detach().clone() for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(weights):
        raise ArtifactError(f"{source} does not hold a state dict, that is, tensors by name")
    try:
        with whole(target) as beside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside))
    except SafetensorError as error:
        raise InputError(f"cannot write {target}: {error}") from None
    return len(tensors)


def _unsafe(data: bytes) -> str:
    """What a file would import, where torch can tell."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # a file that is damaged as well
        return ""
    names = ", ".join(sorted(found)[:5])
    return f"it would import {names}; save network.state_dict() instead of the network" if found else ""
