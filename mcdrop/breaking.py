"""Passes that a network may break off, such as under masks that it hardly ever gets."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mcdrop.forward import out_of_memory
from mcdrop.volatile import Left

__all__ = ["may_break_off"]


@contextmanager
def may_break_off(module: nn.Module) -> Iterator[None]:
    """Ends quietly where a network fails, and puts back what that left half changed; not where memory is out."""
    before = Left(module)
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        before.put_back()
