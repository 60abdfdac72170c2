"""A live shadow: a second module tree that shares a network's parameters and buffers but owns its training flags.

The user's module is never touched, so there is nothing to restore, and another thread may use or train it meanwhile.
``_parameters`` and ``_buffers`` are the same dict objects, so ``.to()``, ``load_state_dict`` and optimiser steps on
the original are seen by the shadow at once. Layers and hooks added to or taken from the original later are not.
"""

import copy
import functools
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from mcdrop.errors import ModelRefused
from mcdrop.registry import TAUGHT_LAYERS, Taught
from mcdrop.standing import kept_tensors

__all__ = ["PLAYING", "copied", "live_shadow", "reached_originals", "takes_masks", "unwrapped"]

PLAYING = threading.local()  # its ``mode`` drops in this thread's dropout layers; without one they do as ever

_SHARED = ("_parameters", "_buffers")
_DEEPEST = 3  # containers inside containers that may still hold a module


def _drops(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a dropout layer that runs a function of torch, or what drops in its place."""

    def drop(self: Any, input: Tensor) -> Tensor:
        mode = getattr(PLAYING, "mode", None)
        if mode is None:
            return function(input, self.p, self.training, self.inplace)
        dropped: Tensor = mode.rules[function](mode, input, self.p, self.training, self.inplace)
        return dropped

    return drop


_DROPS: dict[type, Callable[..., Tensor]] = {
    nn.Dropout: _drops(F.dropout),
    nn.Dropout1d: _drops(F.dropout1d),
    nn.Dropout2d: _drops(F.dropout2d),
    nn.Dropout3d: _drops(F.dropout3d),
}


def takes_masks(layer: nn.Module) -> bool:
    """Whether a layer of a shadow is a dropout layer that may be given its masks."""
    return getattr(layer.__dict__.get("forward"), "__func__", None) in _DROPS.values()


def live_shadow(module: nn.Module, *, drawing: bool = False) -> nn.Module:
    """Gives a shadow of the module with every training flag off.

    One that is ``drawing`` has the forwards and flags of the layers that the user has taught (``register``), and its
    dropout layers may be given their masks (``PLAYING``).

    Raises:
        ModelRefused: a TorchScript module, whose Python structure is gone.
    """
    originals = list(module.modules())
    for original in originals:
        if isinstance(original, torch.jit.ScriptModule):
            raise ModelRefused(
                f"{type(module).__name__} is or holds a TorchScript module: its draws cannot be turned into masks; "
                "wrap the Python module it was made from"
            )
    copies: dict[int, Any] = {
        id(original): object.__new__(type(original)) for original in originals if unwrapped(original) is original
    }
    copies.update(
        {id(original): copies[id(unwrapped(original))] for original in originals if id(original) not in copies}
    )
    hooks = [held for original in originals for held in vars(original).values() if type(held) is OrderedDict]
    copies.update({id(held): OrderedDict() for held in hooks})  # before all else: handles of theirs lead there
    for held in hooks:
        copies[id(held)].update({key: _remap(item, copies) for key, item in held.items()})
    for original in originals:
        if unwrapped(original) is original:
            copies[id(original)].__dict__.update(_state(original, copies))
            if parametrize.is_parametrized(original):
                _keep_apart(copies[id(original)], original.parametrizations)
            if drawing and type(original) in TAUGHT_LAYERS:
                _teach(copies[id(original)], TAUGHT_LAYERS[type(original)])
            elif drawing and type(original) in _DROPS:
                layer = copies[id(original)]
                layer.__dict__.setdefault("forward", types.MethodType(_DROPS[type(original)], layer))
    shadow: nn.Module = copies[id(module)]
    return shadow


def _keep_apart(layer: nn.Module, names: Any) -> None:
    """Has ``parametrize.cached`` keep the weights of a shadow's layer by that layer: torch does by the original."""

    def own(name: str) -> property:
        def weight(self: Any) -> Tensor:
            if not parametrize._cache_enabled:
                return cast(Tensor, self.parametrizations[name]())
            kept, key = parametrize._cache, (id(self), name)
            if kept.get(key) is None:
                kept[key] = self.parametrizations[name]()
            return cast(Tensor, kept[key])

        return property(weight, getattr(before, name).fset)

    before = type(layer)
    owned = {name: own(name) for name in names if isinstance(getattr(before, name, None), property)}
    layer.__class__ = type(before.__name__, (before,), {"__module__": before.__module__, **owned})


def _teach(layer: nn.Module, taught: Taught) -> None:
    layer.__dict__.update(taught.flags)
    if taught.forward is not None:
        layer.__dict__["forward"] = types.MethodType(taught.forward, layer)


def unwrapped(module: nn.Module) -> nn.Module:
    """Gives the module inside what ``torch.compile`` made of it, or the module itself."""
    while isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        module = module._orig_mod
    return module


def copied(module: nn.Module) -> nn.Module:
    """Gives a copy of a network, with weights of its own.

    What a training step left on it, such as the last attention weights, comes without its history: torch refuses to
    copy a tensor that has one.
    """
    whole = unwrapped(module)
    left = (tensor for _, tensor in (*kept_tensors(whole), *whole.named_buffers()) if not tensor.is_leaf)
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in left}
    twin = copy.deepcopy(whole, copies)
    for child in twin.modules():
        _led(vars(child), copies)
    return twin


def _led(container: dict[Any, Any] | list[Any], copies: dict[int, Any], depth: int = 0) -> None:
    """Leads the functions in what was copied to the copy: Python's own takes them, and what they have closed over."""
    for key, value in [*(container.items() if isinstance(container, dict) else enumerate(container))]:
        if isinstance(value, types.FunctionType | functools.partial):
            container[key] = _remap(value, copies)
        elif type(value) in (dict, OrderedDict, list) and depth < _DEEPEST:
            _led(value, copies, depth + 1)


def reached_originals(module: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """Runs something made of a shadow, and gives the paths of the original modules that it reached all the same.

    With each comes the function, but of torch's, in which it was seen first.
    """
    paths = {id(child): path for path, child in module.named_modules()}
    reached: dict[str, str] = {}

    def look(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call":
            for value in tuple(frame.f_locals.values()):
                if id(value) in paths and isinstance(value, nn.Module):
                    reached.setdefault(paths[id(value)], _not_of_torch(frame).f_code.co_qualname)

    if sys.getprofile() is not None:  # somebody profiles this thread, and could not be put back
        return {}
    sys.setprofile(look)  # of this thread alone
    try:
        run()
    finally:
        sys.setprofile(None)
    return reached


def _not_of_torch(frame: types.FrameType) -> types.FrameType:
    """The frame itself, or the nearest that called it."""
    while frame.f_globals.get("__name__", "").startswith("torch.") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _state(original: nn.Module, copies: dict[int, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in original.__dict__.items():
        state[name] = value if name in _SHARED else _remap(value, copies)
    children = ((name, copies[id(child)] if child is not None else None) for name, child in original._modules.items())
    state["_modules"] = type(original._modules)(children)
    state["training"] = False
    state["_compiled_call_impl"] = None  # compiled code of ``module.compile()`` would run the original
    return state


def _remap(value: Any, copies: dict[int, Any], depth: int = 0) -> Any:
    """Points everything that leads to a module at the shadow.

    Plain containers become the shadow's own, so that it never writes to the user's; what two places share (a dict of a
    module and of a hook's closure, say) they share in the shadow too. Functions, partial functions and
    plain objects are rebuilt only where they hold a module.
    """
    if isinstance(value, nn.Module) or id(value) in copies:
        return copies.get(id(value), value)
    if depth >= _DEEPEST:
        return value
    remap = functools.partial(_remap, copies=copies, depth=depth + 1)
    if type(value) is tuple:
        return tuple(remap(item) for item in value)
    if type(value) is list:
        items: list[Any] = []
        copies[id(value)] = items
        items += [remap(item) for item in value]
        return items
    if type(value) is dict or type(value) is OrderedDict:  # the latter are hooks, which a forward may register
        by_key: dict[Any, Any] = type(value)()
        copies[id(value)] = by_key
        by_key |= {key: remap(item) for key, item in value.items()}
        return by_key
    if type(value) is RemovableHandle:
        return _remap_handle(value, copies)
    if isinstance(value, types.MethodType):
        owner = remap(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        return functools.partial(
            remap(value.func), *map(remap, value.args), **{k: remap(v) for k, v in value.keywords.items()}
        )
    if isinstance(value, types.FunctionType):
        return _remap_function(value, remap)
    return _remap_object(value, remap)


def _remap_handle(handle: RemovableHandle, copies: dict[int, Any]) -> RemovableHandle:
    """Gives a handle that takes a hook off the shadow, and not off the user's network."""
    held = [ref() for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
    if not any(id(hooks) in copies for hooks in held):
        return handle
    twin = object.__new__(RemovableHandle)
    own = [copies.get(id(hooks), hooks) for hooks in held]
    twin.__setstate__((own[0], handle.id, tuple(own[1:])))
    return twin


def _remap_function(function: types.FunctionType, remap: Callable[[Any], Any]) -> types.FunctionType:
    """Rebuilds a function whose closure holds a module, such as a lambda made in ``__init__``."""
    cells = function.__closure__ or ()
    contents = [_content(cell) for cell in cells]
    mapped = [remap(content) for content in contents]
    if all(new is old for new, old in zip(mapped, contents, strict=True)):
        return function
    fresh = tuple(types.CellType(content) for content in mapped)
    rebuilt = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, fresh
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _remap_object(value: Any, remap: Callable[[Any], Any]) -> Any:
    """Copies a plain object that holds a module among its attributes."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, type | types.ModuleType | torch.Tensor):
        return value
    if not any(isinstance(item, nn.Module | types.MethodType | functools.partial) for item in attributes.values()):
        return value
    twin = copy.copy(value)
    twin.__dict__.update({name: remap(item) for name, item in attributes.items()})
    return twin
