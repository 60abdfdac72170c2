"""What a network writes to itself: every forward starts from what was there when the network was wrapped.

A buffer that is written to in eval, the hidden state that a recurrent network keeps for its next call, a list that
grows: passes that went on from one another would depend on their order, and on how many there were before.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from mcdrop.errors import ModelRefused
from mcdrop.standing import is_plain

__all__ = ["Left", "from_start", "kept_tensors", "own", "volatile"]

_VOLATILE = "_mcdrop_volatile"  # on a shadow's root: the names of what its forwards write to, as in state_dict
_ABSENT = object()
_OURS = frozenset(vars(nn.Module())) | {_VOLATILE}
_CLOSED = (nn.Module, Tensor, np.ndarray, type, FunctionType, MethodType, ModuleType, partial)  # not looked into
_NAMED, _LISTED = (dict, OrderedDict, defaultdict), (list, deque, tuple)
_DEEPEST, _MOST, _BYTES = 3, 1000, 2**24  # things inside of things, their entries, and arrays that are looked into


def volatile(module: nn.Module) -> tuple[str, ...]:
    """Names what the forwards of a shadow write to."""
    names: tuple[str, ...] = vars(module).get(_VOLATILE, ())
    return names


def own(shadows: Sequence[nn.Module], names: Collection[str]) -> None:
    """Makes the forwards of shadows start anew from these buffers and attributes; buffers become the shadows' own.

    Raises:
        ModelRefused: one is a parameter.
    """
    for shadow in shadows:
        for name in names:
            owner, key = _owner(shadow, name)
            if key in owner._parameters:
                raise ModelRefused(f"the network writes to its parameter {name} in eval mode")
            owner.__dict__["_buffers"] = {
                other: tensor.clone() if other == key and tensor is not None else tensor
                for other, tensor in owner._buffers.items()
            }
        shadow.__dict__[_VOLATILE] = tuple(sorted({*volatile(shadow), *names}))


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


@contextmanager
def from_start(module: nn.Module) -> Iterator[None]:
    """Gives a forward its own copies of what it writes to, and takes what it wrote away again."""
    owners = [_owner(module, name) for name in volatile(module)]
    # a buffer that the forward registers is in neither place before
    held = [_Held(place, key) for owner, key in owners for place in (owner._buffers, vars(owner))]
    for one in held:
        one.lend()
    try:
        yield
    finally:
        for one in held:
            one.put_back()


class Left:
    """What forwards leave on a module: attributes set anew, taken away or changed, such as a list that grows."""

    def __init__(self, module: nn.Module) -> None:
        """Remembers what is there now."""
        self._module = module
        self._before = {name: _Held(vars(owner), key) for name, owner, key in _attributes(module)}

    def changed(self) -> list[str]:
        """Names what is not as it was."""
        now = {name: (vars(owner), key) for name, owner, key in _attributes(self._module)}
        new = [name for name in now if name not in self._before]
        return sorted([*new, *(name for name, held in self._before.items() if not held.stands())])

    def put_back(self) -> None:
        """Makes all as it was."""
        for name, owner, key in [*_attributes(self._module)]:
            if name not in self._before:
                del vars(owner)[key]
        for held in self._before.values():
            held.put_back()


class _Held:
    """What stands in one place, with all that it holds."""

    def __init__(self, place: dict[str, Any], key: str) -> None:
        self._place, self._key = place, key
        self._value = place.get(key, _ABSENT)
        self._content = _Content(self._value)

    def lend(self) -> None:
        """Puts copies of tensors in their places; what holds them stays the same, since others may hold it too."""
        if isinstance(self._value, Tensor):
            self._place[self._key] = self._value.clone()
        self._content.lend()

    def stands(self) -> bool:
        """Whether it is as it was."""
        return _same(self._place.get(self._key, _ABSENT), self._value) and self._content.stands()

    def put_back(self) -> None:
        """Makes it as it was."""
        if self._value is _ABSENT:
            self._place.pop(self._key, None)
        else:
            self._place[self._key] = self._value
        self._content.put_back()


class _Content:
    """What a value holds: entries of a container, attributes of an object, numbers of an array."""

    def __init__(self, value: Any, depth: int = 0) -> None:
        self._value = value
        self._numbers = value.copy() if isinstance(value, np.ndarray) and value.nbytes <= _BYTES else None
        self._entries = _entries(value) if depth < _DEEPEST else None
        self._inside = [_Content(item, depth + 1) for _, item in self._entries or ()]

    def lend(self) -> None:
        """Puts copies of tensors in their places."""
        entries = self._entries or []
        if any(isinstance(item, Tensor) for _, item in entries):
            _refill(self._value, [(key, item.clone() if isinstance(item, Tensor) else item) for key, item in entries])
        for one in self._inside:
            one.lend()

    def stands(self) -> bool:
        """Whether it is as it was."""
        return self._holds() and all(one.stands() for one in self._inside)

    def _holds(self) -> bool:
        if self._numbers is not None:
            return np.array_equal(self._value, self._numbers)
        if self._entries is None:
            return True
        now = _entries(self._value) or []
        return len(now) == len(self._entries) and all(
            (key is other or key == other) and _same(item, before)
            for (key, item), (other, before) in zip(now, self._entries, strict=True)
        )

    def put_back(self) -> None:
        """Makes it as it was; what is as it was is left alone, since others may read it meanwhile."""
        if not self._holds():
            if self._numbers is not None:
                self._value[...] = self._numbers
            else:
                _refill(self._value, self._entries or [])
        for one in self._inside:
            one.put_back()


def _same(now: Any, before: Any) -> bool:
    """Whether something is the same, or an equal number or text, which is another object as often as not."""
    simple = type(now) in (bool, int, float, str) and type(now) is type(before)
    return now is before or (simple and bool(now == before))


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an object holds, each under its key; None where nothing is looked into."""
    found: Any = None
    if type(value) in _NAMED:
        found = value.items()
    elif type(value) in _LISTED:
        found = enumerate(value)
    elif not isinstance(value, _CLOSED) and type(getattr(value, "__dict__", None)) is dict:
        value = vars(value)
        found = value.items()
    return [*found] if found is not None and len(value) <= _MOST else None


def _refill(container: Any, entries: Sequence[tuple[Any, Any]]) -> None:
    """Makes a container or an object hold these entries; a tuple holds what it ever held."""
    if type(container) in _LISTED:
        if type(container) is not tuple:
            container.clear()
            container.extend(item for _, item in entries)
        return
    held = container if type(container) in _NAMED else vars(container)
    held.clear()
    held.update(entries)


def _attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Walks over (name, owner, key) of what modules keep beside weights, buffers and children."""
    for path, child in module.named_modules():
        yield from ((f"{path}.{key}".removeprefix("."), child, key) for key in [*vars(child)] if key not in _OURS)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walks over (name, tensor) of what modules keep as plain attributes, also inside of others."""
    for name, owner, key in _attributes(module):
        yield from ((name, tensor) for tensor in _tensors(vars(owner)[key]))


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from (value,) if is_plain(value) else ()
    elif depth < _DEEPEST:
        for _, item in _entries(value) or ():
            yield from _tensors(item, depth + 1)
