"""What a network writes to itself: every forward starts from what was there when the network was wrapped.

A buffer that is written to in eval, the hidden state that a recurrent network keeps for its next call, a list that
grows: passes that went on from one another would depend on their order, and on how many there were before.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mcdrop.errors import ModelRefused
from mcdrop.holders import Collected, apart, contents, held_by_hooks, holders, holds, hooks, made_hold
from mcdrop.locks import forkable
from mcdrop.standing import attributes, kept_tensors, mapped, memory_of

__all__ = ["Left", "alike", "clean_ways", "from_start", "own", "placed_starts", "starts", "volatile"]

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


def starts(module: nn.Module, names: Collection[str], tied: Collection[str]) -> dict[str, Any]:
    """Gives copies of what stands in some places now, and what parameters are that are ``tied`` to others.

    Raises:
        ModelRefused: one of the former is a parameter, or shares its memory with another.
    """
    weights = {id(weight) for weight in module.parameters()}  # in a list of weights, those that a forward does not set
    names = names and {*names, *_same(module, names, weights)}
    found, shares, clone = {}, _shared(module, names, weights), _cloner(lambda leaf: id(leaf) in weights)
    for name in sorted({*names, *tied}):
        owner, key = _owner(module, name)
        if key in owner._parameters and name in names:
            raise ModelRefused(f"the network writes to its parameter {name} in eval mode; compute with another tensor")
        if name in shares:
            said = f"the network writes to {name} in eval mode, which shares its memory with {shares[name]}"
            raise ModelRefused(said)
        tensors: Any = {**vars(owner), **owner._buffers, **owner._parameters}
        found[name] = mapped(tensors.get(key, _ABSENT), clone)
    return found


def _tensors(module: nn.Module, weights: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """Walks over what modules keep, without weights in lists, and buffers and parameters, under all their names."""
    yield from ((name, tensor) for name, tensor in kept_tensors(module) if id(tensor) not in weights)
    yield from module.named_buffers(remove_duplicate=False)
    yield from module.named_parameters()


def _same(module: nn.Module, names: Collection[str], weights: Collection[int]) -> set[str]:
    """Names the places of tensors that are also in one of some places."""
    written = {id(tensor) for name, tensor in _tensors(module, weights) if name in names}
    return {name for name, tensor in _tensors(module, weights) if id(tensor) in written}


def _shared(module: nn.Module, names: Collection[str], weights: Collection[int]) -> dict[str, str]:
    """Says with what some that are written to share their memory; a tensor may be in several of their places itself."""
    pieces: dict[int, list[tuple[str, int]]] = {}
    for name, tensor in _tensors(module, weights) if names else ():
        if tensor.numel() and (place := memory_of(tensor)) is not None:
            pieces.setdefault(place, []).append((name, id(tensor)))
    found: dict[str, str] = {}
    for piece in pieces.values():
        for name, one in piece:
            others = [other for other, also in piece if other != name and (also != one or other not in names)]
            if name in names and others:
                found[name] = others[0]
    return found


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

    Buffers and parameters are put in dicts of its own: a captured graph, or the user's network, may read the others
    meanwhile, and a parameter that a forward sets, as it is, in place of what it drops in it would stay.
    Weights that torch keeps for it (``parametrize.cached``) go with it: others have other masks.
    A class, because every single pass enters it, and a generator would cost several times as much.
    """

    __slots__ = ("_dicts", "_held", "_module", "_parametrized")

    def __init__(self, module: nn.Module) -> None:
        """Takes a shadow."""
        self._module, self._held, self._dicts = module, list[_Held](), list[tuple[nn.Module, str, Any]]()
        self._parametrized = _parametrized(module)

    def __enter__(self) -> None:
        """Puts the copies in their places."""
        if self._parametrized:
            _TURN.acquire()
        try:
            self._forget()
            clone = _cloner(lambda leaf: isinstance(leaf, nn.Parameter))
            for name, start in volatile(self._module).items():
                owner, key = _owner(self._module, name)
                for kind in ("_buffers", "_parameters"):
                    self._dicts.append((owner, kind, vars(owner)[kind]))
                    owner.__dict__[kind] = {**vars(owner)[kind]}
                owner._parameters.pop(key, None)  # what a forward sets there may be none
                self._held.append(_Held(owner._buffers if key in owner._buffers else vars(owner), key))
                self._held[-1].put(mapped(start, clone))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Takes away what was written."""
        try:
            self._forget()
            for one in reversed(self._held):
                one.put_back()
            for owner, kind, tensors in reversed(self._dicts):
                owner.__dict__[kind] = tensors
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
        others = apart(module)
        modules = [*module.modules(), *others]
        found = *(holder for _, holder in holders(module)), *hooks(modules)
        self._shared = [(holder, contents(holder)) for holder in found]
        self._collected = Collected([*held_by_hooks(modules), *map(vars, others)])

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


def _attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The attributes that are the network's."""
    return (found for found in attributes(module) if found[2] not in (_VOLATILE, _KEEPING, _CLEAN))


def _itself(leaf: Any) -> Any:
    return leaf


def _cloner(is_weight: Callable[[Tensor], bool]) -> Callable[[Any], Any]:
    """Gives what copies tensors but for the network's weights; one that is in several places is one there again."""
    made: dict[int, Tensor] = {}

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_weight(leaf):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.clone()
        return made[id(leaf)]

    return clone


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
