"""What a network writes to itself: every forward starts from what was there when the network was wrapped.

A buffer that is written to in eval, the hidden state that a recurrent network keeps for its next call, a list that
grows: passes that went on from one another would depend on their order, and on how many there were before.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mcdrop.errors import ModelRefused
from mcdrop.holders import Collected, contents, held_by_hooks, holders, holds, made_hold
from mcdrop.locks import forkable
from mcdrop.standing import attributes, kept_tensors, mapped

__all__ = [
    "Left", "alike", "clean_ways", "from_start", "own", "own_tensor_dicts", "placed_starts", "starts", "volatile",
]  # fmt: skip

_VOLATILE = "_mcdrop_volatile"  # on a shadow's root: what its forwards start from, by name as in state_dict
_KEEPING = "_mcdrop_keeping"  # there too: its modules with parametrized tensors, and the names of these
_CLEAN = "_mcdrop_clean"  # there too: the ways through it that leave nothing on it
_ABSENT = object()
_PLAIN = (bool, int, float, str, bytes)
# what ``parametrize.cached`` keeps, and for how long, is one for the whole process: a forward that other threads end it
# for, or put it on for, would draw more or fewer weights. So forwards that read any go one at a time
_TURN = forkable(threading.RLock())


def volatile(module: nn.Module) -> dict[str, Any]:
    """Gives what the forwards of a shadow write to, and what they start from."""
    found: dict[str, Any] = vars(module).get(_VOLATILE, {})
    return found


def starts(module: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Gives copies of what stands in some places now.

    Raises:
        ModelRefused: one is a parameter, or shares its memory with another.
    """
    found, holders = {}, _holders(module) if names else []
    for name in sorted(names):
        owner, key = _owner(module, name)
        if key in owner._parameters:
            raise ModelRefused(f"the network writes to its parameter {name} in eval mode")
        value = owner._buffers[key] if key in owner._buffers else vars(owner).get(key, _ABSENT)
        shared = [other for held in holders if name in held for other in held - {name}]
        if shared:
            raise ModelRefused(f"the network writes to {name} in eval mode, which shares its memory with {shared[0]}")
        found[name] = mapped(value, _cloned)
    return found


def _holders(module: nn.Module) -> list[set[str]]:
    """The names of the tensors that lie in the same memory, for each piece of it."""
    found: dict[int, set[str]] = {}
    for name, tensor in (*kept_tensors(module), *module.named_buffers(), *module.named_parameters()):
        if tensor.numel():
            found.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return [*found.values()]


def placed_starts(module: nn.Module, device: torch.device) -> dict[str, Any]:
    """Gives what the forwards of a shadow start from on another device."""

    def there(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return {name: mapped(start, there) for name, start in volatile(module).items()}


def own(shadows: Sequence[nn.Module], start: Mapping[str, Any]) -> None:
    """Makes the forwards of shadows start from these."""
    for shadow in shadows:
        shadow.__dict__[_VOLATILE] = {**volatile(shadow), **start}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


class from_start:
    """Gives a forward its own copies of what it writes to, and takes what it wrote away again.

    Buffers are put in a dict of its own: a captured graph, or the user's network, may read the other meanwhile.
    Weights that torch keeps for it (``parametrize.cached``) go with it: others have other masks.
    A class, because every single pass enters it, and a generator would cost several times as much.
    """

    __slots__ = ("_dicts", "_held", "_module", "_parametrized")

    def __init__(self, module: nn.Module) -> None:
        """Takes a shadow."""
        self._module, self._held, self._dicts = module, list[_Held](), list[tuple[nn.Module, Any]]()
        self._parametrized = _parametrized(module)

    def __enter__(self) -> None:
        """Puts the copies in their places."""
        if self._parametrized:
            _TURN.acquire()
        try:
            self._forget()
            for name, start in volatile(self._module).items():
                owner, key = _owner(self._module, name)
                self._dicts.append((owner, owner._buffers))
                owner.__dict__["_buffers"] = {**owner._buffers}
                self._held.append(_Held(owner._buffers if key in owner._buffers else vars(owner), key))
                self._held[-1].put(mapped(start, _cloned))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Takes away what was written."""
        try:
            self._forget()
            for one in reversed(self._held):
                one.put_back()
            for owner, buffers in reversed(self._dicts):
                owner.__dict__["_buffers"] = buffers
        finally:
            if self._parametrized:
                _TURN.release()

    def _forget(self) -> None:
        """Takes what torch keeps of the shadow's own modules; the user's have other keys."""
        for child, name in self._parametrized:
            parametrize._cache.pop((id(child), name), None)


def _parametrized(module: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """The modules of a shadow with parametrized tensors, and the names of these; looked for once."""
    found: tuple[tuple[nn.Module, str], ...] | None = vars(module).get(_KEEPING)
    if found is None:
        some = [child for child in module.modules() if parametrize.is_parametrized(child)]
        found = tuple((child, name) for child in some for name in child.parametrizations)  # type: ignore[union-attr]
        module.__dict__[_KEEPING] = found
    return found


class Left:
    """What forwards leave on a module: attributes set anew, taken away or changed, such as a list that grows.

    What they leave in an object or a queue, which the user's own network shares, is put back too, and of what hooks and
    classes collect, tensors that nobody can read are taken away.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remembers what is there now."""
        self._module = module
        self._before = {name: _Held(vars(owner), key) for name, owner, key in _attributes(module)}
        self._shared = [(holder, contents(holder)) for _, holder in holders(module)]
        self._collected = Collected(held_by_hooks(module))

    def changed(self) -> list[str]:
        """Names what is not as it was."""
        new = [name for name, _, _ in _attributes(self._module) if name not in self._before]
        return sorted([*new, *(name for name, held in self._before.items() if not held.stands())])

    def nothing(self) -> bool:
        """Whether all is as it was."""
        return not self.changed() and all(holds(*both) for both in self._shared) and self._collected.nothing()

    def put_back(self) -> None:
        """Makes all as it was."""
        for shared, content in self._shared:
            if not holds(shared, content):
                made_hold(shared, content)
        self._collected.clear()
        for name, owner, key in [*_attributes(self._module)]:
            if name not in self._before:
                del vars(owner)[key]
        for held in self._before.values():
            held.put_back()


def clean_ways(module: nn.Module) -> set[object]:
    """Gives the set of ways through a shadow that are known to leave nothing on it."""
    known: set[object] = module.__dict__.setdefault(_CLEAN, set())
    return known


class _Held:
    """What stands in one place, with what a container held."""

    def __init__(self, place: dict[str, Any], key: str) -> None:
        self._place, self._key = place, key
        self._value = place.get(key, _ABSENT)
        self._content = mapped(self._value, _itself)

    def put(self, value: Any) -> None:
        """Puts something in its place; a container stays the same and holds it, since hooks may hold the container."""
        if type(self._value) in (dict, list) and type(value) is type(self._value):
            _refill(self._value, value)
        elif value is _ABSENT:
            self._place.pop(self._key, None)
        else:
            self._place[self._key] = value

    def stands(self) -> bool:
        """Whether it is as it was."""
        now = self._place.get(self._key, _ABSENT)
        same = type(now) in _PLAIN or now is self._value
        return same and alike(now, self._content)

    def put_back(self) -> None:
        """Makes it as it was."""
        if self._value is _ABSENT:
            self._place.pop(self._key, None)
            return
        self._place[self._key] = self._value
        if not alike(self._value, self._content):
            _refill(self._value, self._content)


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


@contextmanager
def own_tensor_dicts(module: nn.Module, written: set[str], swapped: set[str]) -> Iterator[None]:
    """Leaves the user's parameters and buffers as they were, and notes what a forward does to their places.

    ``written`` takes the names of those that are set anew, ``swapped`` the modules that have others for a while.
    """
    shared = [
        (path, child, kind, getattr(child, kind))
        for path, child in module.named_modules()
        for kind in ("_parameters", "_buffers")
    ]
    for _, child, kind, tensors in shared:
        child.__dict__[kind] = _Noting(tensors)
    try:
        yield
    finally:
        for path, child, kind, tensors in shared:
            own = child.__dict__[kind]
            child.__dict__[kind] = tensors
            changed = {name for name in {*own, *tensors} if own.get(name) is not tensors.get(name)}
            written |= {_full(path, name) for name in changed}
            if any(_full(path, name) not in written for name in own.touched):  # set as ``x += 1`` does, it is written
                swapped.add(path)


def _full(path: str, name: str) -> str:
    return f"{path}.{name}".removeprefix(".")


def _attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The attributes that are the network's."""
    return (found for found in attributes(module) if found[2] not in (_VOLATILE, _KEEPING, _CLEAN))


def _itself(leaf: Any) -> Any:
    return leaf


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def alike(value: Any, content: Any) -> bool:
    """Whether a container still holds what it held."""
    if value is content:
        return True
    if type(value) in _PLAIN:  # as often as not another object
        return type(content) is type(value) and bool(content == value)
    if type(value) is not type(content) or type(value) not in (dict, list, tuple):
        return False
    if type(value) is dict:
        return [*value] == [*content] and all(alike(value[key], content[key]) for key in value)
    return len(value) == len(content) and all(map(alike, value, content))


def _refill(container: Any, content: Any) -> None:
    """Makes a list or dict hold what another one does; a tuple holds what it ever held."""
    if type(container) is list:
        container[:] = content
    elif type(container) is dict:
        container.clear()
        container.update(content)
