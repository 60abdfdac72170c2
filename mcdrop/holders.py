"""What holds what a network's objects, containers and hooks keep: a shadow shares it with the user's own network."""

import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from mcdrop.standing import attributes, mapped

__all__ = ["holders", "holds", "inside", "made_hold", "what_it_holds"]

_OURS = "_mcdrop_"  # attributes that a shadow has of us
_CONTAINERS = (dict, list, deque, set)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEPEST, _MOST = 4, 100  # holders inside of holders, and their entries, that are looked into


def holders(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Walks over (name, holder) of what holds what is in the objects and containers of attributes, and in hooks.

    A holder is a dict, a list, a deque, a set or a variable of a function. Plain lists and dicts of attributes are none
    unless they are large: a shadow has its own. Hooks keep things in the object that is called or whose method is, in
    variables around a function, also global ones, and in arguments of a partial one; networks do in their classes.
    """
    for name, leaves in _kept(module):
        seen: dict[int, Any] = {}
        for leaf in leaves:
            _look_into(leaf, seen)
        yield from ((name, holder) for holder in seen.values() if not isinstance(holder, tuple))


def inside(module: nn.Module) -> dict[str, list[Any]]:
    """Gives what objects, arrays and other containers hold that a network keeps: nothing puts back what they held."""
    found: dict[str, list[Any]] = {}
    for name, leaves in _kept(module):
        found.setdefault(name, []).extend(number for leaf in leaves for number in _numbers(leaf))
    for name, holder in holders(module):
        held = what_it_holds(holder)
        found[name] += [*held, *held.values()] if isinstance(held, dict) else held
    return found


def _kept(module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Walks over (name, what is kept there) of a network's attributes, its hooks and its classes."""
    for name, owner, key in attributes(module):
        leaves: list[Any] = []
        if not key.startswith(_OURS):
            mapped(vars(owner)[key], leaves.append)
            yield name, leaves
    for path, child in module.named_modules():
        for key in _HOOKS:
            yield f"{path}.{key}".removeprefix("."), [*getattr(child, key).values()]
    for kind in {type(child) for child in module.modules() if not _torchs(type(child))}:
        own = [value for key, value in vars(kind).items() if key == "forward" or isinstance(value, _CONTAINERS)]
        yield kind.__name__, own


def _torchs(given: Any) -> bool:
    """Whether a class or function is of torch, which keeps nothing there of what a network does."""
    return str(given.__module__).startswith("torch.")


def _numbers(leaf: Any) -> list[Any]:
    """What stands in an array."""
    if not isinstance(leaf, np.ndarray):
        return []
    if leaf.dtype.hasobject:
        return [*leaf.flat]
    return [hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8).data).digest()]


def _look_into(value: Any, seen: dict[int, Any], depth: int = 0, *, objects: bool = True) -> None:
    """Collects the holders in a value by their ids; what an object holds is no further object of the network's."""
    if isinstance(value, type | ModuleType | nn.Module | Tensor) or depth > _DEEPEST:
        return
    if isinstance(value, MethodType):
        within: Any = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        within = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        named = () if _torchs(value) else value.__code__.co_names
        around = [value.__globals__.get(name) for name in named]
        within = (*(value.__closure__ or ()), *(one for one in around if isinstance(one, _CONTAINERS)))
    elif isinstance(value, (*_CONTAINERS, tuple, CellType)):
        within = value
    else:
        within, objects = (getattr(value, "__dict__", None) if objects else None), False
    if not isinstance(within, (*_CONTAINERS, tuple, CellType)) or id(within) in seen:
        return
    seen[id(within)] = within
    held = what_it_holds(within)
    if len(held) <= _MOST:
        for item in [*held.values()] if isinstance(held, dict) else held:
            _look_into(item, seen, depth + 1, objects=objects)


def what_it_holds(holder: Any) -> dict[Any, Any] | list[Any]:
    """Gives what a holder holds now."""
    if isinstance(holder, CellType):
        try:
            return [holder.cell_contents]
        except ValueError:  # a variable that is not set yet
            return []
    return dict(holder) if isinstance(holder, dict) else [*holder]


def holds(holder: Any, content: dict[Any, Any] | list[Any]) -> bool:
    """Whether a holder holds the very things that it held."""
    now = what_it_holds(holder)
    if isinstance(now, dict) and isinstance(content, dict):
        return [*now] == [*content] and all(now[key] is content[key] for key in now)
    return [*map(id, now)] == [*map(id, content)]


def made_hold(holder: Any, content: Any) -> None:
    """Makes a holder hold what it held."""
    if isinstance(holder, CellType):
        if content:
            holder.cell_contents = content[0]
        else:
            del holder.cell_contents
        return
    holder.clear()
    (holder.update if isinstance(holder, dict | set) else holder.extend)(content)
