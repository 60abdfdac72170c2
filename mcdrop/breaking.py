"""Passes that a network may break off, such as under masks that it hardly ever gets."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mcdrop.forward import out_of_memory
from mcdrop.volatile import Left

__all__ = ["may_break_off"]


@contextmanager
def may_break_off(module: nn.Module, before: Left | None = None) -> Iterator[None]:
    """Ends quietly where a network fails, and puts back what was there, or ``before``; not where memory is out."""
    before = Left(module) if before is None else before
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        before.put_back()
