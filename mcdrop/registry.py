"""What users teach mcdrop: layers and functions whose draws it cannot turn into masks by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mcdrop.errors import InputError

__all__ = ["TAUGHT_FUNCTIONS", "TAUGHT_LAYERS", "Taught", "register", "unregister"]


@dataclass(frozen=True)
class Taught:
    """A layer's stochastic forward, and attributes to set while it draws."""

    forward: Callable[..., Any] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)


TAUGHT_LAYERS: dict[type, Taught] = {}
TAUGHT_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def register(
    target: type | Callable[..., Any],
    forward: Callable[..., Any] | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
) -> None:
    """Teaches mcdrop a layer or a function; it holds for networks that are wrapped from now on.

    Args:
        target: a layer class (its subclasses are not meant), or a torch function.
        forward: what runs instead while passes are run: for a layer a function of (layer, *inputs), for a function one
            of the same arguments; written with torch's own draws (``torch.bernoulli``, ``torch.rand``, ``F.dropout``),
            which become masks.
        flags: attributes to set on the layer while passes are run, such as ``{"mc": True}``. The user's own layer keeps
            its own.

    Raises:
        InputError: nothing to do was given, what is no function or no flags, or flags for a function.

    >>> import torch
    >>> class Mask(torch.nn.Module):  # draws with numpy, out of sight
    ...     ...
    >>> register(Mask, lambda layer, x: x * torch.bernoulli(torch.full_like(x, 0.9)) / 0.9)
    >>> unregister(Mask)
    """
    if forward is not None and not callable(forward):
        raise InputError(f"forward must be a function, got {forward!r}")
    if not isinstance(flags, Mapping | None) or not all(isinstance(name, str) for name in flags or ()):
        raise InputError(f"flags must be a dict of attributes such as {{'mc': True}}, got {flags!r}")
    if isinstance(target, type):
        if forward is None and not flags:
            raise InputError(f"give a forward function or flags for {target.__name__}")
        TAUGHT_LAYERS[target] = Taught(forward, dict(flags or {}))
    elif not callable(target) or forward is None or flags:
        raise InputError("a function is taught with another function of the same arguments, and without flags")
    else:
        TAUGHT_FUNCTIONS[target] = forward


def unregister(target: type | Callable[..., Any]) -> None:
    """Forgets what was taught of a layer or function."""
    if isinstance(target, type):
        TAUGHT_LAYERS.pop(target, None)
    else:
        TAUGHT_FUNCTIONS.pop(target, None)
