"""What the code of a network can reach: attributes, variables around functions, and globals that functions name.

None of that code is run. Objects say of themselves what they like and may run anything when they are asked, so their
types are asked by Python's own means, and what they hold is asked of Python's collector of garbage.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dis import opmap
from itertools import chain, islice
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import nn

__all__ = ["MOST", "NEAR", "Held", "Reached", "held", "reached"]

MOST = 1_000_000  # objects that hold others, the nearest first; a second or two
NEAR = 100_000  # where it is looked again
_FEW = 100
_ENTRIES = 1000  # of a container at a time, so that a large one keeps no other waiting
_KNOWN = {*sys.stdlib_module_names, "mcdrop", "numpy", "scipy", "torch"}  # whose code draws from nothing of a network's
_PLAIN = {*map(id, (str, bytes, int, float, bool, type(None), CodeType))}  # by id, as types may have their own hash
_HOLDS, _MADE = 1 << 14, 1 << 9  # flags of a type: its objects hold others; it was made when the program ran
_IMPORT = opmap["IMPORT_NAME"]
_ATTRIBUTES = vars(nn.Module)["__dict__"].__get__
_VARIABLES = vars(ModuleType)["__dict__"].__get__
_BASES, _DICT, _FLAGS, _MODULE, _QUALNAME = (
    vars(type)[name].__get__ for name in ("__bases__", "__dict__", "__flags__", "__module__", "__qualname__")
)


Held = dict[tuple[int, str], Any]  # by layer and name


class Reached(NamedTuple):
    """What was found, and whether all that can be reached was looked at."""

    found: list[Any]
    whole: bool


def held(module: nn.Module) -> Held:
    """Gives what the attributes of a network hold, and what small lists and dicts in them do."""
    found: Held = {}
    for place, layer in _layers(module).items():
        for name, value in _ATTRIBUTES(layer).items():
            found[place, name] = value
            found |= {(place, f"{name}.{number}"): one for number, one in enumerate(_few(value))}
    return found


def _few(value: Any) -> list[Any]:
    """The entries of a small list or dict."""
    entries = value.values() if type(value) is dict else value if type(value) is list else ()
    return [*entries] if len(entries) <= _FEW else []


def reached(module: nn.Module, kinds: tuple[type, ...], *, most: int = MOST, since: Held | None = None) -> Reached:
    """Looks for objects of some types that the code of a network can reach, the nearest first, among so many.

    With ``since`` it looks from those attributes alone that hold something else than then.
    """
    seen = _layers(module)  # held on to, so that no two have the same id
    if since is not None:
        seen = {id(value): value for place, value in held(module).items() if since.get(place) is not value}
    found = [one for one in seen.values() if issubclass(type(one), kinds)]
    left = deque(one for one in seen.values() if not issubclass(type(one), kinds))
    rest = deque[Iterator[Any]]()
    while (left or rest) and len(seen) < most:
        entries = iter(_beyond(left.popleft())) if left else rest.popleft()
        part = [*islice(entries, _ENTRIES)]
        if len(part) == _ENTRIES:
            rest.append(entries)
        for one in part:
            kind = type(one)
            if id(kind) in _PLAIN or id(one) in seen or (id(kind) in _CONTENTS and not one):
                continue
            wanted = issubclass(kind, kinds)
            if wanted or _FLAGS(kind) & _HOLDS or issubclass(kind, np.ndarray):
                seen[id(one)] = one
                (found if wanted else left).append(one)
            else:
                part.append(kind)
    return Reached(found, not (left or rest))


def _layers(module: nn.Module) -> dict[int, Any]:
    """A module and all in it by their ids, as ``modules()`` would give them where no class has its own."""
    layers: dict[int, Any] = {}
    left: list[Any] = [module]
    for one in left:
        if id(one) not in layers and issubclass(type(one), nn.Module):
            layers[id(one)] = one
            inner: Any = dict.get(_ATTRIBUTES(one), "_modules")
            left += dict.values(inner) if issubclass(type(inner), dict) else ()
    return layers


def _beyond(one: Any) -> Iterable[Any]:
    """What an object leads to."""
    kind = type(one)
    if (entries := _CONTENTS.get(id(kind))) is not None:
        return entries(one)
    if issubclass(kind, type):
        return _of_class(one)
    if issubclass(kind, ModuleType):
        return () if _known(_VARIABLES(one).get("__name__")) else _of_changing(_VARIABLES(one))
    if issubclass(kind, np.ndarray):
        return _of_array(one)
    return (kind, *gc.get_referents(one))


def _of_class(cls: Any) -> Iterator[Any]:
    """Its bases, also of known ones: torch makes classes around a user's."""
    yield type(cls)
    yield from _BASES(cls)
    if not _known_class(cls):
        yield from (*_DICT(cls).values(),)


def _of_array(array: Any) -> Iterator[Any]:
    yield from (type(array), *gc.get_referents(array))
    if np.ndarray.dtype.__get__(array).hasobject:
        for one in np.ndarray.flat.__get__(array):
            yield np.void.item(one) if issubclass(type(one), np.void) else one


def _of_changing(container: Any) -> Iterator[Any]:
    """The entries of what another thread may change meanwhile, which ends a walk through it."""
    try:
        yield from _entries(container)
    except RuntimeError:
        yield from _entries(container.copy())


def _entries(container: Any) -> Iterator[Any]:
    return chain(container.values(), container) if type(container) is dict else iter(container)


def _of_function(function: FunctionType) -> Iterator[Any]:
    """What it keeps, and the globals it names where it is of no known library, however it was wrapped."""
    yield from (function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function))
    variables = function.__globals__
    if not _known(dict.get(variables, "__name__")):
        names, imports = _names(function.__code__)
        yield from _named([variables, *(_imported(variables, imports) if imports else ())], names)


def _named(scopes: list[dict[str, Any]], names: dict[str, None]) -> Iterator[Any]:
    """The variables that code names, also those of modules that it names."""
    seen = {*map(id, scopes)}
    for scope in scopes:
        for name in names:
            value: Any = dict.get(scope, name)
            if issubclass(type(value), ModuleType):
                inner = _VARIABLES(value)
                if id(inner) not in seen and not _known(inner.get("__name__")):
                    seen.add(id(inner))
                    scopes.append(inner)
            elif value is not None:
                yield value


def _imported(variables: dict[str, Any], names: dict[str, None]) -> Iterator[dict[str, Any]]:
    """The modules that code of some names imports when it runs, as far as they are there."""
    yield {name: sys.modules.get(name.partition(".")[0]) for name in names}
    yield {name: sys.modules.get(name) for name in names}
    package = dict.get(variables, "__package__")
    while type(package) is str and package:
        yield {name: sys.modules.get(f"{package}.{name}".rstrip(".")) for name in names}
        package = package.rpartition(".")[0]


def _names(code: CodeType) -> tuple[dict[str, None], dict[str, None]]:
    """All names in code in their order, and those where it imports, which are those of modules among others."""
    names = dict.fromkeys(code.co_names)
    imports = {**names} if _IMPORT in code.co_code[::2] else {}
    for constant in code.co_consts:
        if type(constant) is CodeType:
            for own, inner in zip((names, imports), _names(constant), strict=True):
                own |= inner
    return names, imports


def _known(name: Any) -> bool:
    """Whether a module of some name is of a library that is known."""
    return type(name) is str and name.partition(".")[0] in _KNOWN


def _known_class(cls: type) -> bool:
    """Whether a class is of a library that is known, and stands there: others are made of what a user gives."""
    if not _FLAGS(cls) & _MADE:
        return _known(_MODULE(cls))
    where = _DICT(cls).get("__module__")
    module = sys.modules.get(where) if _known(where) else None
    if not issubclass(type(module), ModuleType):
        return False
    outer, *inner = str.split(_QUALNAME(cls), ".")
    found = _VARIABLES(module).get(outer)
    return found is cls or (bool(inner) and found is not None and "<locals>" not in inner)


_CONTENTS: dict[int, Callable[[Any], Iterator[Any]]] = {
    id(list): iter,
    id(tuple): iter,
    id(frozenset): iter,
    id(set): _of_changing,
    id(deque): _of_changing,
    id(dict): _of_changing,
    id(FunctionType): _of_function,
}
