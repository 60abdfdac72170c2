"""What a forward sets among a network's parameters and buffers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcdrop.standing import stamp

__all__ = ["own_tensor_dicts"]

_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class _Noting(dict[str, Any]):
    """A module's parameters or buffers; notes which are set or taken away."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.touched: set[str] = set()

    def __setitem__(self, name: str, value: Any) -> None:
        self.touched.add(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.touched.add(name)
        super().__delitem__(name)


class _Setting(TorchFunctionMode):
    """Notes whose numbers are set by ``tensor.data = other``, which no operation tells of, if only for a while."""

    def __init__(self, names: Mapping[int, str], written: set[str]) -> None:
        super().__init__()
        self._names, self._written = names, written

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func != _SETS_DATA or id(args[0]) not in self._names:
            return func(*args, **(kwargs or {}))
        before = stamp(args[0])
        func(*args)
        if stamp(args[0]) != before:
            self._written.add(self._names[id(args[0])])
        return None


@contextmanager
def own_tensor_dicts(module: nn.Module, written: set[str], swapped: set[str], tied: set[str]) -> Iterator[None]:
    """Leaves the user's parameters and buffers as they were, and notes what a forward does to their places.

    ``written`` takes the names of those that are set anew, ``tied`` of parameters that are set to another one of their
    module, which they are already, and ``swapped`` the modules that have others for a while.
    """
    shared = [
        (path, child, kind, getattr(child, kind))
        for path, child in module.named_modules()
        for kind in ("_parameters", "_buffers")
    ]
    memory = [
        (_full(path, name), tensor, tensor.data, stamp(tensor))
        for path, _, _, tensors in shared
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    for _, child, kind, tensors in shared:
        child.__dict__[kind] = _Noting(tensors)
    try:
        with _Setting({id(tensor): name for name, tensor, _, _ in memory}, written):
            yield
    finally:
        for name, tensor, data, place in memory:
            if stamp(tensor) != place:
                tensor.data = data
                written.add(name)
        for path, child, kind, tensors in shared:
            own = child.__dict__[kind]
            child.__dict__[kind] = tensors
            changed = {name for name in {*own, *tensors} if own.get(name) is not tensors.get(name)}
            again = {name for name in own.touched & {*tensors} - changed if _others(tensors, name) - own.touched}
            tied |= {_full(path, name) for name in again if kind == "_parameters"}
            written |= {_full(path, name) for name in changed}
            if any(_full(path, name) not in written | tied for name in own.touched):  # ``x += 1`` writes, and sets it
                swapped.add(path)


def _others(tensors: Mapping[str, Any], name: str) -> set[str]:
    """Names the others that hold the very tensor that one name holds."""
    return {other for other, tensor in tensors.items() if other != name and tensor is tensors[name] is not None}


def _full(path: str, name: str) -> str:
    return f"{path}.{name}".removeprefix(".")
