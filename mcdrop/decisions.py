"""What a network decides by a value, when many passes run at once: each pass decides by its own.

Inside ``vmap`` a value that a mask has changed is one for each pass. Where all passes decide alike they stay together;
else they are told apart by what they decide, and run again in groups that do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECISION_RULES", "Parted"]


class Parted(Exception):
    """Passes decide differently: ``values`` says of each, in order, by what."""

    def __init__(self, values: list[Any]) -> None:
        """Takes what each pass decides by."""
        super().__init__(f"passes decide by different values, such as {values[0]} and {next(_others(values), None)}")
        self.values = values


def _others(values: list[Any]) -> Any:
    return (value for value in values if value != values[0])


def _of_each_pass(tensor: Tensor) -> list[Any] | None:
    """What stands in a single value of each pass; None where it is not of several passes, or nobody knows it yet."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor) or tensor.numel() != 1:
        return None
    values = functorch.get_unwrapped(tensor)
    return values.flatten().tolist() if type(values) is Tensor and not _wrapped(values) else None


def _wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def _rule(function: Callable[[Tensor], Any], kind: type) -> Callable[..., Any]:
    """A rule for a function that makes a Python number of a tensor."""

    def rule(mode: object, tensor: Tensor) -> Any:
        values = _of_each_pass(tensor)
        if values is None:
            return function(tensor)
        told = list(map(kind, values))
        if len(set(told)) > 1:
            raise Parted(told)
        return told[0]

    return rule


def _item(mode: object, tensor: Tensor) -> Any:
    """A real number stays a tensor, with which the network may compute and compare."""
    values = _of_each_pass(tensor)
    if values is not None and tensor.is_floating_point():
        return tensor.reshape(())
    return _rule(Tensor.item, bool if tensor.dtype == torch.bool else int)(mode, tensor)


DECISION_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__bool__: _rule(Tensor.__bool__, bool),
    Tensor.__float__: _rule(Tensor.__float__, float),
    Tensor.__index__: _rule(Tensor.__index__, int),
    Tensor.__int__: _rule(Tensor.__int__, int),
    Tensor.is_nonzero: _rule(Tensor.is_nonzero, bool),
    Tensor.item: _item,
    torch.is_nonzero: _rule(torch.is_nonzero, bool),
}
