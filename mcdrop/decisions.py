"""What a network decides by a value, when many passes run at once: each pass decides by its own.

Inside ``vmap`` a value that a mask has changed is one for each pass. A run goes the way that most of its passes go;
those that would go another one are noted, and their outputs are not to be used. Nothing is raised: the network would
see it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECISION_RULES", "Parted", "deciding"]

_NOW = threading.local()  # its ``stays`` says of each pass of this thread's run whether it goes the run's way


class Parted(Exception):
    """Hardly two passes decide alike, so that nothing is gained by running them together."""


@contextmanager
def deciding(passes: int) -> Iterator[list[bool]]:
    """Lets passes that run together decide by values; gives of each whether it has gone the way of the run."""
    stays, outer = [True] * passes, getattr(_NOW, "stays", None)
    _NOW.stays = stays
    try:
        yield stays
    finally:
        _NOW.stays = outer


def _of_each_pass(tensor: Tensor, passes: int) -> list[Any] | None:
    """What stands in a single value of each pass; None where it is not of several passes, or nobody knows it yet."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor) or tensor.numel() != 1:
        return None
    values = functorch.get_unwrapped(tensor)
    known = type(values) is Tensor and not functorch.is_functorch_wrapped_tensor(values)
    return values.flatten().tolist() if known and values.numel() == passes else None


def _rule(function: Callable[[Tensor], Any], kind: type | None = None) -> Callable[..., Any]:
    """A rule for a function that makes a Python number of a tensor, of a ``kind`` (None: of the tensor's)."""

    def rule(mode: object, tensor: Tensor) -> Any:
        stays = getattr(_NOW, "stays", None)
        values = None if stays is None else _of_each_pass(tensor, len(stays))
        if stays is None or values is None:
            return function(tensor)
        told = values if kind is None else list(map(kind, values))
        words = list(map(repr, told))  # in which NaN is like NaN
        (most, _), *_ = Counter(word for word, stay in zip(words, stays, strict=True) if stay).most_common(1)
        stays[:] = [stay and word == most for word, stay in zip(words, stays, strict=True)]
        return told[words.index(most)]

    return rule


DECISION_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__bool__: _rule(Tensor.__bool__, bool),
    Tensor.__float__: _rule(Tensor.__float__, float),
    Tensor.__index__: _rule(Tensor.__index__, int),
    Tensor.__int__: _rule(Tensor.__int__, int),
    Tensor.is_nonzero: _rule(Tensor.is_nonzero, bool),
    Tensor.item: _rule(Tensor.item),
    torch.is_nonzero: _rule(torch.is_nonzero, bool),
}
