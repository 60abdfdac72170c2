"""What holds what a network's objects, containers and hooks keep: a shadow shares it with the user's own network."""

import functools
import hashlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from mcdrop.standing import attributes, is_dead, mapped

__all__ = ["Collected", "apart", "contents", "held_by_hooks", "holders", "holds", "hooks", "inside", "made_hold"]

_OURS = "_mcdrop_"  # attributes that a shadow has of us
# these very types: another may give something new at each reading, and do something of its own at each writing
_DICTS, _LISTS = (dict, OrderedDict, defaultdict), (list, deque, set)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEPEST = 4  # holders inside of holders
_MOST = 100  # entries of a holder that are looked into
_LARGEST = 10_000  # entries of one that a hook fills


def holders(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Walks over (name, holder) of what holds what is in the objects and containers that attributes are.

    A holder is a dict, a list, a deque or a set. Plain lists and dicts of attributes are none unless they are large: a
    shadow has its own.
    """
    for name, leaves in _kept(module):
        yield from ((name, held) for held in map(_holder, leaves) if held is not None)


def _holder(leaf: Any) -> Any:
    if type(leaf) in (*_DICTS, *_LISTS):
        return leaf
    if isinstance(leaf, type | ModuleType | FunctionType | nn.Module | Tensor):
        return None
    held = getattr(leaf, "__dict__", None)
    return held if type(held) in _DICTS else None


def inside(module: nn.Module) -> dict[str, list[Any]]:
    """Gives what objects, arrays and other containers hold that a network keeps: nothing puts back what they held."""
    found: dict[str, list[Any]] = {}
    for name, leaves in _kept(module):
        found.setdefault(name, []).extend(number for leaf in leaves for number in _numbers(leaf))
    for name, holder in holders(module):
        held = contents(holder)
        found.setdefault(name, []).extend([*held, *held.values()] if isinstance(held, dict) else held)
    return found


def _kept(module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Walks over (name, what is kept there) of a network's attributes."""
    for name, owner, key in attributes(module):
        if not key.startswith(_OURS):
            leaves: list[Any] = []
            mapped(vars(owner)[key], leaves.append)
            yield name, leaves


def _numbers(leaf: Any) -> list[Any]:
    """What stands in an array."""
    if not isinstance(leaf, np.ndarray):
        return []
    if leaf.dtype.hasobject:
        return [*leaf.flat]
    return [hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8).data).digest()]


def contents(holder: Any) -> dict[Any, Any] | list[Any]:
    """Gives what a holder holds now."""
    if isinstance(holder, CellType):
        try:
            return [holder.cell_contents]
        except ValueError:  # a variable that is not set yet
            return []
    return dict(holder) if type(holder) in _DICTS else [*holder]


def holds(holder: Any, content: dict[Any, Any] | list[Any]) -> bool:
    """Whether a holder holds the very things that it held."""
    now = contents(holder)
    if isinstance(now, dict) and isinstance(content, dict):
        return [*now] == [*content] and all(now[key] is content[key] for key in now)
    return [*map(id, now)] == [*map(id, content)]


def made_hold(holder: Any, content: dict[Any, Any] | list[Any]) -> None:
    """Makes a holder hold what it held."""
    holder.clear()
    (holder.update if type(holder) in (*_DICTS, set) else holder.extend)(content)


def hooks(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """Lists where the forward hooks of modules stand, which a forward may register too."""
    return [getattr(child, key) for child in modules for key in _HOOKS]


# -- what hooks and classes collect -----------------------------------------------------------------------------------


def held_by_hooks(modules: Sequence[nn.Module]) -> list[Any]:
    """Lists what forward hooks of modules keep things in, and containers of the network's own classes.

    Hooks keep things in the object that is called or whose method is, in variables around a function, also global ones,
    and in arguments of a partial one; such a variable is a holder as well.
    """
    seen: dict[int, Any] = {}
    for registered in hooks(modules):
        for hook in registered.values():
            _look_into(hook, seen)
    for child in modules:
        if not _torchs(type(child)):
            for value in vars(type(child)).values():
                if type(value) in (*_DICTS, *_LISTS):
                    _look_into(value, seen)
    return [holder for holder in seen.values() if not isinstance(holder, tuple)]


def apart(module: nn.Module) -> list[nn.Module]:
    """Lists modules that a network keeps and none registers, such as those in a plain list: they are the user's own."""
    found, trees = {id(child): child for child in module.modules()}, [module]
    registered = len(found)
    while trees:
        for leaf in (leaf for _, leaves in _kept(trees.pop()) for leaf in leaves):
            for tree in (one for one in _modules(leaf) if id(one) not in found):
                trees.append(tree)
                found |= {id(child): child for child in tree.modules()}
    return [*found.values()][registered:]


def _modules(leaf: Any) -> list[nn.Module]:
    """The module that something is, or those in it; what is a list or dict of another type runs no code of its own."""
    if isinstance(leaf, nn.Module):
        return [leaf]
    if isinstance(leaf, dict):
        held: Any = dict.values(leaf)
    elif isinstance(leaf, list):
        held = list.__iter__(leaf)
    else:
        held = _holder(leaf) or ()
        held = held.values() if type(held) in _DICTS else held
    return [one for one in islice(held, _MOST) if isinstance(one, nn.Module)]


def _torchs(given: Any) -> bool:
    """Whether a class or function is of torch, which keeps nothing there of what a network does."""
    return str(given.__module__).startswith("torch.")


def _look_into(value: Any, seen: dict[int, Any], depth: int = 0, *, objects: bool = True) -> None:
    """Collects the holders in a value by their ids; what an object holds is no further object of the network's."""
    if isinstance(value, type | ModuleType | nn.Module | Tensor) or depth > _DEEPEST:
        return
    if isinstance(value, MethodType):
        within: Any = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        within = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        around = [value.__globals__.get(name) for name in (() if _torchs(value) else value.__code__.co_names)]
        within = (*(value.__closure__ or ()), *(one for one in around if type(one) in (*_DICTS, *_LISTS)))
    elif isinstance(value, tuple | CellType) or type(value) in (*_DICTS, *_LISTS):
        within = value
    else:
        within, objects = (_holder(value) if objects else None), False
    if within is None or id(within) in seen:
        return
    seen[id(within)] = within
    if isinstance(within, CellType) or len(within) <= _MOST:
        held = contents(within)
        for item in [*held.values()] if isinstance(held, dict) else held:
            _look_into(item, seen, depth + 1, objects=objects)


class Collected:
    """What holders held; tensors that a forward under vmap or a trace has put there since can be taken away.

    Nothing else is touched, since holders may be the user's own and other threads may fill them meanwhile.
    """

    def __init__(self, holders: list[Any]) -> None:
        """Remembers what is there now; holders of very many things are left alone."""
        few = [holder for holder in holders if isinstance(holder, CellType) or len(holder) <= _LARGEST]
        self._before = [(holder, contents(holder)) for holder in few]

    def nothing(self) -> bool:
        """Whether nothing came that would be taken away."""
        return not any(_dead(holder, content) for holder, content in self._before)

    def clear(self) -> None:
        """Takes such tensors away, and sets a variable or an entry that was overwritten to what it was."""
        for holder, content in self._before:
            for key in _dead(holder, content):
                _takes_away(holder, content, key)


def _dead(holder: Any, content: dict[Any, Any] | list[Any]) -> list[Any]:
    """The keys, in a dict, or the things, elsewhere, that hold what became of tensors."""
    now = contents(holder)
    if isinstance(now, dict):
        old: Callable[[Any], Any] = content.get if isinstance(content, dict) else lambda key: None
        return [key for key, value in now.items() if value is not old(key) and _has_dead(value)]
    had = {*map(id, content)}
    return [one for one in now if id(one) not in had and _has_dead(one)]


def _has_dead(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(_has_dead(one) for one in value[:_MOST])
    if type(value) in _DICTS:
        return len(value) <= _MOST and any(_has_dead(one) for one in [*value.values()])
    return isinstance(value, Tensor) and is_dead(value)


def _takes_away(holder: Any, content: Any, key: Any) -> None:
    if isinstance(holder, CellType):
        if content:
            holder.cell_contents = content[0]
        else:
            del holder.cell_contents
    elif type(holder) in _DICTS:
        if key in content:
            holder[key] = content[key]
        else:
            del holder[key]
    elif type(holder) is set:
        holder.discard(key)
    else:
        del holder[next(place for place, one in enumerate(holder) if one is key)]
