"""What the code of a network can reach: attributes, variables around functions, and globals that functions name."""

import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["reached"]

_MOST = 20_000  # objects that are looked at, the nearest first
_ENTRIES = 1000  # of a container
_KNOWN = {*sys.stdlib_module_names, "mcdrop", "numpy", "scipy", "torch"}  # whose code draws from nothing of a network's
_LEAVES = (str, bytes, int, float, type(None), Tensor, np.ndarray, torch.dtype, torch.device, CodeType, ModuleType)


def reached(module: nn.Module, kinds: tuple[type, ...]) -> list[Any]:
    """Gives the objects of some types that the code of a network can reach, as far as ``_MOST`` objects tell.

    None of its code is run for that, so objects are asked for their type alone and not for what they say of it.
    """
    found, seen, left = [], dict[int, Any](), deque[Any]([module])  # held on to, so that no two have the same id
    while left and len(seen) < _MOST:
        one = left.popleft()
        if id(one) in seen or issubclass(type(one), _LEAVES):
            continue
        seen[id(one)] = one
        if issubclass(type(one), kinds):
            found.append(one)
        else:
            left.extend(islice(_beyond(one), _ENTRIES))
    return found


def _beyond(one: Any) -> Iterable[Any]:
    """What an object leads to."""
    if type(one) is FunctionType:
        return () if _known(one) else _of_function(one)
    if issubclass(type(one), type):
        return () if _known(one) else (*type.__dict__["__dict__"].__get__(one).values(), *one.__bases__)
    return (type(one), *gc.get_referents(one))


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from (function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function))
    yield from _named(function.__globals__, _names(function.__code__))


def _named(variables: Mapping[str, Any], names: Set[str], depth: int = 0) -> Iterator[Any]:
    """The variables that code names, also those of modules that it names."""
    for name in names & variables.keys():
        value = variables[name]
        if type(value) is not ModuleType:
            yield value
        elif depth < 2 and value.__name__.partition(".")[0] not in _KNOWN:
            yield from _named(vars(value), names, depth + 1)


def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _known(code: Any) -> bool:
    """Whether a function or class is of a library that is known."""
    return str(code.__module__).partition(".")[0] in _KNOWN
