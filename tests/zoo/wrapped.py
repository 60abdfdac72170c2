"""The zoo, wrapped: each specimen once for all contract tests, with what that did to the user's module."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop.rows import Rows

from . import ZOO, Example, Specimen, call, why_missing

__all__ = ["CONTROLLED", "REFUSED", "Wrapped", "built", "passes", "same", "snapshot", "taken", "tolerance", "wrapped"]

# A whole architecture: hundreds of times the work of the rest, which is a few small layers each.
HEAVY = {"googlenet"}


def _param(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow if name in HEAVY else (), id=name)


CONTROLLED = [_param(name) for name, specimen in ZOO.items() if not specimen.refused]
REFUSED = [_param(name) for name, specimen in ZOO.items() if specimen.refused]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Wrapped:
    """A specimen, the user's module, its rows, the model made of it, and all that a wrap and a predict changed."""

    specimen: Specimen
    module: nn.Module
    example: Example
    model: mcdrop.Model
    changed: list[str]

    @property
    def rows(self) -> Rows:
        return self.model.rows(self.example)

    @property
    def says_coupled(self) -> bool:
        """Whether the audit owns up to rows that depend on one another."""
        return any("a row's answer depends on its batch" in warning for warning in self.model.audit.warnings)


def built(name: str) -> tuple[nn.Module, Example]:
    """Gives a fresh copy of a specimen's network and its example, or skips the test."""
    for library in ZOO[name].requires:
        if reason := why_missing(library):
            pytest.skip(reason)
    return ZOO[name].build()


@cache
def wrapped(name: str) -> Wrapped:
    """Wraps a specimen, and makes a first prediction."""
    specimen = ZOO[name]
    module, example = built(name)
    before = snapshot(module, example)
    model = mcdrop.wrap(module, example=example, output=specimen.output, tuning={})  # the same on every machine
    mcdrop.predict(model, example, passes=4)
    after = snapshot(module, example)
    changed = [key for key in sorted(before.keys() | after.keys()) if not _equal(before.get(key), after.get(key))]
    return Wrapped(specimen, module, example, model, changed)


def passes(made: Wrapped, example: Example, count: int, *, seed: int = 0) -> Array:
    """Gives passes of the model, (T, N, ...), independent of one another."""
    forward = made.model.backend.forward
    return forward(made.model.rows(example), count, seed=seed, start=0, sampler="iid").astype(np.float64)


def taken(example: Example, which: Sequence[int]) -> Example:
    """Gives the chosen rows of an example."""
    if isinstance(example, Tensor):
        return example[list(which)]
    if isinstance(example, dict):
        return {name: leaf[list(which)] for name, leaf in example.items()}
    return tuple(leaf[list(which)] for leaf in example)


def tolerance(module: nn.Module) -> float:
    """What rounding may do to an output, as a part of its largest value: 1e-5 in float32, in deep networks 2e-5.

    In torchvision's efficientnet_b0, of 81 convolutions, plain passes are 4e-6 away from float64, captured ones 9e-6.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    single = 2e-5 if sum(isinstance(child, nn.Conv2d) for child in module.modules()) > _DEEP else 1e-5
    return max((_ROUNDING.get(dtype, single) for dtype in dtypes), default=single)


_DEEP = 50
_ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


def same(left: Any, right: Any, within: float) -> bool:
    """Whether two arrays agree, relative to the largest value."""
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= within * max(np.abs(b).max(), 1e-30))


def plain(made: Wrapped, module: nn.Module) -> Tensor:
    """Gives what a network answers to the user, as rows of numbers."""
    with torch.no_grad():
        output = made.specimen.pick(call(module, made.example))
    return output.unsqueeze(-1) if output.dim() == 1 else output


# -- everything that a user could see of a module ----------------------------------------------------------------------


def snapshot(module: nn.Module, example: Example) -> dict[str, Any]:
    """Everything about a network that a user could see: objects, values, hooks, gradients; the generators."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    leaves = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    seen: dict[str, Any] = {
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": [numpy["state"]["pos"], numpy["state"]["key"].tolist()],
        "Python's generator": random.getstate(),
        "the state dict": list(module.state_dict()),
        "the example": [leaf.clone() for leaf in leaves],
        "the modules": [(path, id(child), type(child)) for path, child in module.named_modules()],
    }
    for path, child in module.named_modules():
        seen[f"{path}: attributes"] = [(name, id(value)) for name, value in vars(child).items()]
        for name, value in vars(child).items():
            if isinstance(value, bool | int | float | str | bytes | list | dict | set | tuple) or value is None:
                # tensors stand below; a hook or a child is the same one or it is not
                seen[f"{path}.{name}"] = copy.copy(value)
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                seen[f"{path}.{name} (tensor)"] = tensor.detach().clone()
                facts = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None)
                seen[f"{path}.{name} (facts)"] = facts
    return seen


def _equal(left: Any, right: Any) -> bool:
    """Equality of plain values; tensors to the bit; any other object must be the same one."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.dtype == right.dtype and torch.equal(left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    plain = isinstance(left, bool | int | float | str | bytes | set)
    return bool(left == right) if plain and type(left) is type(right) else left is right
