"""What a network writes to itself: every forward starts from what was there when the network was wrapped.

A buffer that is written to in eval, the hidden state that a recurrent network keeps for its next call, a list that
grows: passes that went on from one another would depend on their order, and on how many there were before.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mcdrop.errors import ModelRefused
from mcdrop.standing import is_plain

__all__ = ["Left", "from_start", "kept_tensors", "own", "volatile"]

_VOLATILE = "_mcdrop_volatile"  # on a shadow's root: the names of what its forwards write to, as in state_dict
_ABSENT = object()
_OURS = frozenset(vars(nn.Module())) | {_VOLATILE}
_DEEPEST, _MOST = 3, 1000  # containers inside containers, and their entries, that are looked into


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
    """What stands in one place, with what a container held."""

    def __init__(self, place: dict[str, Any], key: str) -> None:
        self._place, self._key = place, key
        self._value = place.get(key, _ABSENT)
        self._content = _mapped(self._value, _itself)

    def lend(self) -> None:
        """Puts copies of tensors in their places; a container stays the same, since others may hold it too."""
        copied = _mapped(self._value, _cloned)
        if _is_container(self._value):
            _refill(self._value, copied)
        elif copied is not self._value:
            self._place[self._key] = copied

    def stands(self) -> bool:
        """Whether it is as it was."""
        now = self._place.get(self._key, _ABSENT)
        if type(now) in (bool, int, float, str):  # as often as not another object
            return type(now) is type(self._value) and bool(now == self._value)
        return now is self._value and _alike(now, self._content)

    def put_back(self) -> None:
        """Makes it as it was."""
        if self._value is _ABSENT:
            self._place.pop(self._key, None)
            return
        self._place[self._key] = self._value
        if _is_container(self._value):
            _refill(self._value, self._content)


def _attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Walks over (name, owner, key) of what modules keep beside weights, buffers and children."""
    for path, child in module.named_modules():
        yield from ((f"{path}.{key}".removeprefix("."), child, key) for key in [*vars(child)] if key not in _OURS)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walks over (name, tensor) of what modules keep as plain attributes, also in containers."""
    for name, owner, key in _attributes(module):
        found: list[Any] = []
        _mapped(vars(owner)[key], found.append)
        yield from ((name, leaf) for leaf in found if isinstance(leaf, Tensor) and is_plain(leaf))


def _is_container(value: Any) -> bool:
    return type(value) in (dict, list, set) and len(value) <= _MOST


def _mapped(value: Any, change: Callable[[Any], Any], depth: int = 0) -> Any:
    """Gives a container with all that it holds changed; anything else changed."""
    if depth < _DEEPEST:
        if type(value) is tuple:
            return tuple(_mapped(item, change, depth + 1) for item in value)
        if type(value) is list and len(value) <= _MOST:
            return [_mapped(item, change, depth + 1) for item in value]
        if type(value) is dict and len(value) <= _MOST:
            return {key: _mapped(item, change, depth + 1) for key, item in value.items()}
        if type(value) is set and len(value) <= _MOST:
            return set(value)
    return change(value)


def _itself(leaf: Any) -> Any:
    return leaf


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _alike(value: Any, content: Any) -> bool:
    """Whether a container still holds what it held."""
    if type(value) is not type(content) or not isinstance(value, tuple | list | dict | set):
        return value is content
    if isinstance(value, set):
        return bool(value == content)
    if isinstance(value, dict):
        return [*value] == [*content] and all(_alike(value[key], content[key]) for key in value)
    return len(value) == len(content) and all(map(_alike, value, content))


def _refill(container: Any, content: Any) -> None:
    """Makes a container hold what another one does."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
