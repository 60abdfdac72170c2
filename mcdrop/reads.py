"""What a network is asked to give as its output, in words: a fit holds for the output that it was made with."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["reads_of"]

_DEEPEST = 8  # objects inside of objects that are looked into


def reads_of(output: Any) -> str:
    """Gives what was asked for as output, as a text that is the same in every process, "" for the only one.

    A function's name alone would not tell one lambda from another: what it does, and holds, is in it too.
    """
    if not callable(output):
        return "" if output is None else str(output)
    name = getattr(output, "__qualname__", type(output).__qualname__)
    return f"{name} {hashlib.sha256(_described(output).encode()).hexdigest()}"


def _described(value: Any, depth: int = 0) -> str:
    """Says what a function does or an object holds, without addresses and in no order of hashes."""
    parts: list[Any] = []
    if isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, *value.co_consts]
    elif isinstance(value, FunctionType):
        parts = [value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty one
                parts.append(cell.cell_contents)
    elif isinstance(value, partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, tuple | list | set | frozenset):
        parts = [*value]
    elif isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    else:
        parts = [re.sub(" at 0x[0-9a-fA-F]+", "", repr(value)), *([vars(value)] if hasattr(value, "__dict__") else [])]
    said = [_described(part, depth + 1) for part in parts] if depth < _DEEPEST else []
    return f"{type(value).__qualname__}({', '.join(sorted(said) if isinstance(value, set | frozenset) else said)})"
