"""A network from the factory that a manifest names, with weights from a safetensors file; nothing is unpickled.

Code never comes from a model folder: the factory is a function that an allow-listed, installed module defines. Modules,
not packages, because the rest of a package can do more than build networks: train, write, fetch, unpickle.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from mcdrop.errors import ArtifactError

__all__ = ["FACTORY_MODULES", "fill", "network"]

# these and those below them; a part that begins with "_" is no builder, but for timm's create_model
FACTORY_MODULES = ("mcdrop.layers", "models.networks", "timm.models", "torchvision.models")

_PRIVATE_BUILDERS = ("timm.models._factory",)
_WEIGHTS_FROM_ELSEWHERE = {
    "checkpoint_path", "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay", "weights",
    "weights_backbone",
}  # fmt: skip
_ELSEWHERE = {"hf-hub", "local-dir"}  # what stands before the ":" of a name, however it is written
_BLANKS = re.compile(r"[\x00-\x20]")  # timm may ask urlsplit, which skips these before a name, and some within it
_FACTORY = re.compile(r"([a-z_][\w.]*):([A-Za-z_]\w*)", re.ASCII)


def network(weights: Mapping[str, Any]) -> nn.Module:
    """Finds the factory that a manifest names, and calls it: a network in eval mode, its weights not yet read.

    Raises:
        ArtifactError: the factory is not of an allowed package, fails, or gives no network.
    """
    if weights["format"] != "safetensors":
        raise ArtifactError(f"weights of the format {weights['format']!r} cannot be read; only 'safetensors' can")
    factory, arguments = str(weights["factory"]), weights.get("arguments", {})
    function = _function(factory)
    fetching = sorted(name for name in arguments if name in _WEIGHTS_FROM_ELSEWHERE and arguments[name])
    fetching += [repr(value) for value in arguments.values() if _is_elsewhere(str(value))]
    if fetching:
        raise ArtifactError(f"factory {factory!r} must not read weights from elsewhere ({', '.join(fetching)})")
    try:
        module = _made(function, {**_nothing_fetched(function, arguments), **arguments})
    except Exception as error:  # whatever a factory does with arguments that it cannot take
        raise ArtifactError(f"factory {factory!r} failed: {type(error).__name__}: {str(error)[:500]}") from error
    if not isinstance(module, nn.Module):
        raise ArtifactError(f"factory {factory!r} gave a {type(module).__name__}, not a torch.nn.Module")
    return module.eval()


def _function(factory: str) -> Any:
    """Imports a factory; a parent package may name what a builder module defines, as ``timm:create_model`` does."""
    match = _FACTORY.fullmatch(factory)
    named = match[1] if match else ""
    if match is None or not (_builds(named) or any(module.startswith(f"{named}.") for module in FACTORY_MODULES)):
        raise ArtifactError(
            f"factory {factory!r} must be 'package.module:function' of one of: {', '.join(FACTORY_MODULES)}"
        )
    try:
        function = getattr(importlib.import_module(named), match[2])
    except Exception as error:  # of a broken library anything, such as a RuntimeError for a missing operator
        said = f"{type(error).__name__}: {str(error)[:500]}"
        raise ArtifactError(f"factory {factory!r} cannot be imported: {said}") from error
    home = str(getattr(function, "__module__", None))
    if not callable(function) or not _builds(home):
        raise ArtifactError(f"factory {factory!r} is defined in {home}, not in one of: {', '.join(FACTORY_MODULES)}")
    return function


def _is_elsewhere(name: str) -> bool:
    """Whether a name says that weights lie elsewhere: timm reads its beginning in any case, blanks aside."""
    source, colon, _ = name.partition(":")
    return bool(colon) and _BLANKS.sub("", source).casefold().replace("_", "-") in _ELSEWHERE


def _nothing_fetched(function: Any, arguments: Mapping[str, Any]) -> dict[str, None]:
    """None for what a factory would fetch unless told otherwise, such as the backbone of torchvision's detectors."""
    with suppress(TypeError, ValueError):  # it shows no signature
        parameters = inspect.signature(function).parameters.values()
        wanted = [one for one in parameters if one.name in _WEIGHTS_FROM_ELSEWHERE and one.name not in arguments]
        return {one.name: None for one in wanted if one.default is not one.empty and one.default}
    return {}


def _builds(module: str) -> bool:
    """Whether the functions that a module defines may be factories."""
    if module in _PRIVATE_BUILDERS:
        return True
    return "._" not in module and any(f"{module}.".startswith(f"{allowed}.") for allowed in FACTORY_MODULES)


def _made(function: Any, arguments: Mapping[str, Any]) -> Any:
    """Calls a factory on the meta device, so that nothing is initialised only to be overwritten.

    A network that holds tensors which the weights do not, or that computes with tensors while it is built, is built
    for real; the global generator is left as it was.
    """
    with suppress(Exception), torch.device("meta"):
        module = function(**arguments)
        if not isinstance(module, nn.Module):
            return module
        stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        held = [value for child in module.modules() for value in (*vars(child).values(), *child._buffers.values())]
        if all(id(value) in stored for value in held if isinstance(value, torch.Tensor)):
            return module
    with torch.random.fork_rng():
        return function(**arguments)


def fill(module: nn.Module, data: bytes, file: str) -> None:
    """Puts the weights of the safetensors file ``file``, whose content is ``data``, into a network.

    They are memory of this process, shared with no other that reads the file: one that stayed mapped could be written
    over while the network answers.

    Raises:
        ArtifactError: they are not those of this network.
    """
    tied = _tied(module)
    try:
        state = load(data)
        found = module.load_state_dict(state, strict=False, assign=True)
    except (SafetensorError, RuntimeError, KeyError) as error:  # the last names a type that torch does not have
        raise ArtifactError(f"{file} does not fit the network: {str(error)[:500]}") from error
    missing = set(found.missing_keys)
    for names in tied:
        if stored := sorted(set(names) & set(state)):
            for name in names:
                _tie(module, stored[0], name)
            missing -= set(names)
    if found.unexpected_keys or missing:
        unexpected = sorted(found.unexpected_keys)
        raise ArtifactError(f"{file} does not fit the network: missing {sorted(missing)}, unexpected {unexpected}")


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of parameters and buffers that are one tensor; only one of them is stored."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    ):  # fmt: skip
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(module: nn.Module, stored: str, name: str) -> None:
    """Makes a name stand for the same tensor as the stored one."""
    (source, _, key), (target, _, other) = stored.rpartition("."), name.rpartition(".")
    owner = module.get_submodule(target)
    tensors: dict[str, Any] = vars(owner)["_parameters" if other in owner._parameters else "_buffers"]
    tensors[other] = getattr(module.get_submodule(source), key)
