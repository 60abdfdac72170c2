"""Hidden features of a torch module, from one deterministic pass, and a digest of its weights."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.errors import InputError, UnknownName
from mcdrop.forward import draws_off
from mcdrop.outputs import Pick
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.standing import attributes, kept_tensors, mapped
from mcdrop.volatile import volatile

__all__ = ["beside_weights", "hidden_features", "is_perceptron", "tensors_digest", "weights_digest"]

_BY_ROW = ("crow_indices", "col_indices", "values")
_BY_COLUMN = ("ccol_indices", "row_indices", "values")
_PARTS = {  # what a sparse tensor is made of, by its layout
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}


def hidden_features(plain: nn.Module, rows: Rows, pick: Pick, layer: str | None) -> Tensor:
    """Gives the output of a submodule: (N, F).

    By default it is the first hidden layer where every weight is a linear layer's (what later layers of a perceptron
    drop tells typical rows from others best), and otherwise what enters the last linear layer that runs. Linear layers
    are modules or, where none of those runs, calls of ``torch.nn.functional.linear``.

    Hooks go on a shadow of their own, so that neither the user's module nor another thread sees them.

    Raises:
        InputError: there is no such submodule, it does not run, or it does not keep the rows apart.
    """
    shadow = live_shadow(plain)
    modules = dict(shadow.named_modules())
    if layer is not None and layer not in modules:
        raise UnknownName("layer", layer, [name for name in modules if name])
    seen: list[Tensor] = []
    for module in [modules[layer]] if layer is not None else modules.values():
        if layer is not None:
            module.register_forward_hook(lambda _, given, result: _note(seen, result))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: _note(seen, given))
    products = _Products(seen)
    with torch.no_grad(), products:
        draws_off(shadow, rows, pick)
    perceptron = is_perceptron(plain)
    if layer is None and not seen:  # a network from a file calls them as functions
        seen, perceptron = products.seen, products.used >= {id(weight) for weight in shadow.parameters()}
    if not seen:
        raise InputError(
            f"layer {layer!r} does not run, or gives no tensor" if layer is not None
            else "no linear layer runs in this network; name the submodule whose output are the features with layer="
        )  # fmt: skip
    features = seen[1] if layer is None and perceptron and len(seen) > 1 else seen[-1]
    if features.dim() == 0 or len(features) != rows.count:
        raise InputError(f"layer {layer or 'before the last linear one'!r} does not keep the rows on its first axis")
    return features.reshape(rows.count, -1)


def is_perceptron(module: nn.Module) -> bool:
    """Whether every weight is a linear layer's."""
    return all(isinstance(one, nn.Linear) or not one._parameters for one in module.modules())


class _Products(TorchFunctionMode):
    """Notes what enters linear layers that are called as functions, and the weights that they use.

    Once a module has been seen, nothing is noted any more: then its features are taken.
    """

    def __init__(self, modules: list[Tensor]) -> None:
        super().__init__()
        self.modules = modules
        self.seen: list[Tensor] = []
        self.used: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and not self.modules:
            given = (*args, *(kwargs or {}).values())
            _note(self.seen, given)
            self.used |= {id(weight) for weight in given[1:]}
        return function(*args, **(kwargs or {}))


def _note(seen: list[Tensor], value: Any) -> None:
    """Keeps the first tensor of what a module takes or gives."""
    values = value if isinstance(value, tuple | list) else (value,)
    seen.extend([item.detach().clone() for item in values if isinstance(item, Tensor)][:1])


def weights_digest(module: nn.Module) -> str:
    """Gives a sha256 over the names, types, shapes and values of all parameters and persistent buffers."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Gives a sha256 over the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for whole, tensor in sorted(tensors.items()):
        for name, part in _parts(whole, tensor.detach()):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
            plain = part.cpu().resolve_conj().resolve_neg().contiguous()
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Walks over (name, part) of the dense tensors that a tensor is made of; a dense one is its own."""
    if tensor.layout not in _PARTS:
        yield name, tensor
        return
    whole = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
    for part in _PARTS[tensor.layout]:
        yield f"{name} {tensor.layout} {tuple(tensor.shape)} {part}", getattr(whole, part)()


def beside_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gives the tensors that a state dict leaves out: buffers that are not persistent, and plain attributes.

    What forwards of a shadow write to is not among them.
    """
    found, left_out = dict[str, Tensor](), volatile(module)
    for name, tensor in (*_sparse_ones(module), *kept_tensors(module)):
        if name not in left_out:
            key, place = name, 1
            while key in found:  # of a list each has its place
                key, place = f"{name}.{place}", place + 1
            found[key] = tensor
    for path, child in module.named_modules():
        for key in child._non_persistent_buffers_set:
            name, buffer = f"{path}.{key}".removeprefix("."), child._buffers.get(key)
            if buffer is not None and name not in left_out:
                found[name] = buffer
    return found


def _sparse_ones(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walks over (name, tensor) of the sparse tensors that modules keep as plain attributes; no graph holds them."""
    for name, owner, key in attributes(module):
        found: list[Any] = []
        mapped(vars(owner)[key], found.append)
        yield from ((name, one) for one in found if isinstance(one, Tensor) and one.layout in _PARTS)
