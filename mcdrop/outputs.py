"""Which tensor of what a network returns is read."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from mcdrop.errors import InputError

__all__ = ["Pick", "picker"]

Pick = Callable[[Any], Tensor]


def picker(output: str | int | Callable[[Any], Any] | None) -> Pick:
    """Gives the function that picks one tensor where a network returns several.

    ``output`` is the name of an entry (of a dict or an attribute of a record), a position, a callable, or None for the
    only floating tensor.
    """
    if callable(output):
        return output

    def pick(result: Any) -> Tensor:
        if isinstance(result, Tensor) and output is None:
            return result
        named = dict(_entries(result))
        if output is not None and str(output) in named:
            return named[str(output)]
        places = [*result.values()] if isinstance(result, Mapping) else result if isinstance(result, tuple) else []
        if isinstance(output, int) and 0 <= output < len(places) and isinstance(places[output], Tensor):
            return cast(Tensor, places[output])
        floating = [name for name, value in named.items() if value.is_floating_point()]
        if output is None and len(floating) == 1:
            return named[floating[0]]
        if output is None and "logits" in floating:
            return named["logits"]
        given = "several outputs" if output is None else f"no output {output!r}"
        known = ", ".join(named) or "none is a tensor"
        raise InputError(f"the network returns {given}; choose one with output=: {known}")

    return pick


def _entries(result: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield "0", result
    elif isinstance(result, Mapping):
        yield from ((str(name), value) for name, value in result.items() if isinstance(value, Tensor))
    elif isinstance(result, tuple | list):
        names = getattr(result, "_fields", range(len(result)))  # those of a named tuple
        yield from ((str(name), value) for name, value in zip(names, result, strict=True) if isinstance(value, Tensor))
    elif hasattr(result, "__dict__"):
        yield from ((name, value) for name, value in vars(result).items() if isinstance(value, Tensor))
