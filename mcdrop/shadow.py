"""A live shadow: a second module tree that shares a network's parameters and buffers but owns its training flags.

The user's module is never touched, so there is nothing to restore, and another thread may use or train it meanwhile.
``_parameters`` and ``_buffers`` are the same dict objects, so ``.to()``, ``load_state_dict`` and optimiser steps on
the original are seen by the shadow at once. Layers added to or taken from the original later are not.
"""

import types
from typing import Any

import torch
from torch import nn

from mcdrop.errors import ModelRefused

__all__ = ["live_shadow", "unwrapped"]

_SHARED = ("_parameters", "_buffers")
_DEEPEST = 3  # containers inside containers that may still hold a module


def live_shadow(module: nn.Module) -> nn.Module:
    """Gives a shadow of the module with every training flag off.

    Raises:
        ModelRefused: a TorchScript module, whose Python structure is gone.
    """
    module = unwrapped(module)
    originals = list(module.modules())
    for original in originals:
        if isinstance(original, torch.jit.ScriptModule):
            raise ModelRefused(
                f"{type(module).__name__} is a TorchScript module: its draws cannot be turned into masks; "
                "wrap the Python module it was made from"
            )
    copies = {id(original): object.__new__(type(original)) for original in originals}
    for original in originals:
        copies[id(original)].__dict__.update(_state(original, copies))
    return copies[id(module)]


def unwrapped(module: nn.Module) -> nn.Module:
    """Gives the module inside what ``torch.compile`` made of it, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def _state(original: nn.Module, copies: dict[int, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in original.__dict__.items():
        state[name] = value if name in _SHARED else _remap(value, copies)
    children = ((name, copies[id(child)] if child is not None else None) for name, child in original._modules.items())
    state["_modules"] = type(original._modules)(children)
    state["training"] = False
    return state


def _remap(value: Any, copies: dict[int, Any], depth: int = 0) -> Any:
    """Points modules and bound methods at the shadow; plain containers become its own, never written for the user."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if depth < _DEEPEST and type(value) in (list, tuple):
        return type(value)(_remap(item, copies, depth + 1) for item in value)
    if depth < _DEEPEST and type(value) is dict:
        return {key: _remap(item, copies, depth + 1) for key, item in value.items()}
    return value
