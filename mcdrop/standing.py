"""What stands in the places of a network's weights and buffers, looked at anew for every run, and stand-ins for it."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

__all__ = ["Outside", "Standing", "State", "constants_of", "holding", "is_plain", "state_of"]

_READING = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


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
        self._facts = _facts(found)
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
        if _facts(found) != self._facts:
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
    """Lists the tensors that modules keep as plain attributes, as positions and masks often are.

    They are those of now: a forward on rows of another shape may put others in their places.
    """
    return tuple(
        State({name: value}, name)
        for child in module.modules()
        for name, value in vars(child).items()
        if type(value) is Tensor and is_plain(value)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of the usual kind, and not what a forward under vmap or functionalize has left behind."""
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta
    left = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)
    return not odd and not left


def _stamps(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Where each lies in memory, and how: ``.data`` gives a tensor other memory without making it another tensor."""
    return [None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _facts(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Which are there, their shapes, types and devices, and which are one."""
    facts: list[Any] = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    seen = [id(tensor) for tensor in tensors if tensor is not None]
    return facts if len(set(seen)) == len(seen) else [*facts, [seen.index(one) for one in seen]]


@contextmanager
def holding(module: nn.Module, state: Sequence[State], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of a shadow's weights, in dicts of its own: the user's are not touched.

    Lists of weights that a layer keeps beside, as recurrent ones do, and plain attributes are replaced too.
    """
    new = {id(one.now()): tensor for one, tensor in zip(state, tensors, strict=True)}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return new[id(value)]
        if isinstance(value, dict):
            return {name: new.get(id(tensor), tensor) for name, tensor in value.items()}
        return [new[id(tensor)] for tensor in value]

    before = [
        (child, name, value)
        for child in module.modules()
        for name, value in [*vars(child).items()]
        if name in ("_parameters", "_buffers")
        or (isinstance(value, Tensor) and id(value) in new)
        or (isinstance(value, list) and value and all(id(item) in new for item in value))
    ]
    for child, name, value in before:
        child.__dict__[name] = replaced(value)
    try:
        yield
    finally:
        for child, name, value in before:
            child.__dict__[name] = value


class Outside(TorchFunctionMode):
    """Notes tensors that are neither a network's nor an input, as of a closure or in a list; puts stand-ins there."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}

    def replaced_by(self, state: Sequence[State], tensors: Sequence[Tensor]) -> Self:
        """Takes the stand-ins for what is known."""
        self._known = {id(one.now()): tensor for one, tensor in zip(state, tensors, strict=True)}
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call with stand-ins; a number that is read of a tensor is that of now."""
        if func not in _READING:
            args, kwargs = _pytree.tree_map_only(Tensor, self._stand_in, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or not is_plain(tensor):
            return tensor
        if id(tensor) not in self._known:
            self.met[id(tensor)] = tensor
        return self._known.get(id(tensor), tensor)
