"""What stands in the places of a network's weights and buffers, looked at anew for every run, and stand-ins for it."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Standing", "State", "as_views", "attributes", "constants_of", "facts_of", "holding", "is_dead", "is_shared",
    "kept_tensors", "mapped", "memory_of", "stamp", "state_of",
]  # fmt: skip

_TORCHS = frozenset(vars(nn.Module()))
_ALONE = 2  # who use a storage: its tensor, and who asks
_DEEPEST, _MOST = 3, 100  # containers inside of containers, and their entries, that are looked into


@dataclass(frozen=True)
class State:
    """Where a weight or buffer stands: the module's own dict, so that the tensor of today is read."""

    tensors: dict[str, Tensor | None]
    name: str

    def now(self) -> Tensor | None:
        """Gives the tensor that stands there now."""
        return self.tensors.get(self.name)


class Standing:
    """The tensors in some places, which a graph was captured with."""

    def __init__(self, places: Sequence[State]) -> None:
        """Takes the places, and keeps what a graph takes for granted of what stands there."""
        self._places = [(one.tensors, one.name) for one in places]
        found = [tensors.get(name) for tensors, name in self._places]
        self._facts = facts_of(found)
        self._latest = found, _stamps(found), [tensor for tensor in found if tensor is not None]

    def now(self) -> list[Tensor] | None:
        """Gives the tensors that stand there now; None where they are no longer there, shaped, typed and shared alike.

        It is the same list as before while each is the same tensor, in the same memory: numbers may have changed.
        """
        found = [tensors.get(name) for tensors, name in self._places]
        before, stamps, tensors = self._latest
        today = _stamps(found)
        if all(map(operator.is_, found, before)) and today == stamps:
            return tensors
        if facts_of(found) != self._facts:
            return None
        self._latest = latest = found, today, [tensor for tensor in found if tensor is not None]
        return latest[2]


def state_of(module: nn.Module) -> tuple[State, ...]:
    """Lists the places of a module's weights and buffers, also those where none stands, such as a missing bias."""
    return tuple(
        State(tensors, name)
        for child in module.modules()
        for tensors in (child.__dict__["_parameters"], child.__dict__["_buffers"])
        for name in tensors
    )


def constants_of(module: nn.Module) -> tuple[State, ...]:
    """Lists the tensors that modules keep beside their weights and buffers, as positions and masks often are.

    They are those of now: a forward on rows of another shape may put others in their places.
    """
    known = {id(one.now()) for one in state_of(module)}
    others = {id(tensor): State({name: tensor}, name) for name, tensor in kept_tensors(module)}
    return tuple(state for key, state in others.items() if key not in known)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walks over (name, tensor) of what modules keep as plain attributes, also in lists, tuples and dicts."""
    for name, owner, key in attributes(module):
        for leaf in _leaves(vars(owner)[key]):
            if type(leaf) in (Tensor, nn.Parameter) and _plain(leaf):
                yield name, leaf


def attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Walks over (name, owner, key) of what modules keep beside weights, buffers and children."""
    for path, child in module.named_modules():
        yield from ((f"{path}.{key}".removeprefix("."), child, key) for key in [*vars(child)] if key not in _TORCHS)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(value, found.append)
    return found


def memory_of(tensor: Tensor) -> int | None:
    """Where the memory begins that a tensor lies in; None of one without a memory of its own, such as a sparse one."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None
    except RuntimeError:
        return None


def is_shared(tensor: Tensor) -> bool:
    """Whether other tensors lie in the memory of one, views or their base; a stand-in calls itself no view."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return bool(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > _ALONE)


def as_views(found: Any, args: Sequence[Any]) -> Any:
    """Makes what lies in the memory of an argument while a graph is captured, and does not say so, that or its view.

    Such are the results of functions that may give an argument back, such as ``atleast_2d``: a write to them would be
    lost on it.
    """
    if type(found) in (list, tuple):
        return type(found)(as_views(one, args) for one in found)
    if not isinstance(found, Tensor) or not torch._is_functional_tensor(found):
        return found
    for one in args:
        if isinstance(one, Tensor) and one.dtype == found.dtype and torch._is_functional_tensor(one):
            inner, other = (torch._from_functional_tensor(each).untyped_storage()._cdata for each in (one, found))
            if inner == other and one.untyped_storage()._cdata != found.untyped_storage()._cdata:
                place, own = ((each.shape, each.stride(), each.storage_offset()) for each in (found, one))
                return one if place == own else one.as_strided(*place)
    return found


def mapped(value: Any, change: Callable[[Any], Any], depth: int = 0) -> Any:
    """Gives a list, tuple or dict with all that it holds changed; anything else changed.

    These are what a shadow has its own of; larger or deeper ones are not looked into.
    """
    if depth < _DEEPEST and type(value) in (dict, list, tuple) and len(value) <= _MOST:
        if type(value) is dict:
            return {key: mapped(item, change, depth + 1) for key, item in value.items()}
        return type(value)([mapped(item, change, depth + 1) for item in value])
    return change(value)


def _plain(tensor: Tensor) -> bool:
    """Whether it is of the usual kind, and not what a forward under vmap or functionalize has left behind."""
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta
    return not odd and not is_dead(tensor)


def is_dead(tensor: Tensor) -> bool:
    """Whether it is what a forward under vmap or functionalize has left behind, which has no numbers."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory, and how: ``.data`` gives it other memory without making it another tensor."""
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except RuntimeError:  # a sparse one has no memory of its own
        return id(tensor), tensor.shape, tensor.dtype, tensor.device


def _stamps(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else stamp(t) for t in tensors]


def facts_of(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Says which are there, their shapes, types and devices, and which are one."""
    facts: list[Any] = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    seen = [id(tensor) for tensor in tensors if tensor is not None]
    return facts if len(set(seen)) == len(seen) else [*facts, [seen.index(one) for one in seen]]


@contextmanager
def holding(module: nn.Module, state: Sequence[State], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of a shadow's weights, in dicts of its own: the user's are not touched.

    Plain attributes are replaced too, and lists of weights that a layer keeps beside, as recurrent ones do.
    """
    new = {id(one.now()): tensor for one, tensor in zip(state, tensors, strict=True)}

    def stand_in(leaf: Any) -> Any:
        return new.get(id(leaf), leaf)

    places = [(vars(owner), key) for _, owner, key in attributes(module)]
    before = [(place, key, place[key]) for place, key in places if any(id(one) in new for one in _leaves(place[key]))]
    dicts = [(vars(child), key, vars(child)[key]) for child in module.modules() for key in ("_parameters", "_buffers")]
    for place, key, value in before:
        place[key] = mapped(value, stand_in)
    for place, key, held in dicts:
        place[key] = {name: stand_in(tensor) for name, tensor in held.items()}
        for tensor in place[key].values() if key == "_parameters" else ():
            if tensor is not None:
                tensor._is_param = True  # what torch tells a parameter by that is of another type
    try:
        yield
    finally:
        for place, key, value in (*before, *dicts):
            place[key] = value
