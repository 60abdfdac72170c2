"""Whether a pass makes one value of several rows, as a sum over a batch is: then passes cannot share a batch.

Where the rows stand once for each pass in one batch, such a value is one of all passes together. What is computed with
it shows when passes are compared, but what is decided by it shows only on rows where the decision is another one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NUMBERS_READ", "Result", "read_after", "result_of", "united"]

NUMBERS_READ = (Tensor.numpy, Tensor.tolist, Tensor.__array__)  # out of torch's sight, so that nobody sees what for
_FEW = 4096  # numbers of a value that are kept to be compared

Number = bool | int | float


class Result(NamedTuple):
    """What one operation made: ``size`` and ``given`` are the bytes of it and of the arguments.

    ``drawn`` counts the draws before, or is 0 where they drop nothing. The ``value`` is there where it is few numbers.
    How many entries there are is ``counted`` where that follows from values.
    """

    name: str
    size: int
    given: int
    drawn: int
    value: Tensor | Number | None
    counted: bool = False


def result_of(name: str, made: object, given: Sequence[Any], *, drawn: int, counted: bool = False) -> Result:
    """Gives what an operation made of its arguments; lists among these are looked into."""
    taken = [leaf for one in given for leaf in (one if isinstance(one, list | tuple) else (one,))]
    value: Tensor | Number | None = None
    if isinstance(made, Number):
        value = made
    elif isinstance(made, Tensor) and made.numel() <= _FEW:
        value = made.detach().clone()
    return Result(name, _bytes(made), sum(map(_bytes, taken)), drawn, value, counted)


def read_after(ones: Sequence[Result], others: Sequence[Result]) -> int:
    """How many draws stood before the first number that Python read otherwise in another pass; 0 where none did."""
    for one, other in zip(ones, others, strict=False):
        if one.name != other.name:
            break
        if (isinstance(one.value, Number) and one.value != other.value) or (one.counted and one.size != other.size):
            return one.drawn
    return 0


def united(few: Sequence[Result], more: Sequence[Result] | None, again: Callable[[], Sequence[Result]]) -> str:
    """Says of a pass on few rows and on more what keeps passes from sharing a batch; empty where nothing does.

    What comes before the first draw may look at all rows, where it finds the same ``again`` on rows that stand there
    twice, as the longest of them is.
    """
    if more is None or len(few) != len(more):
        return "another number of rows takes other operations"
    counts = next((one.name for one in few if one.counted), "")
    if counts:
        return f"{counts} counts entries of all rows"
    ones = [i for i, (a, b) in enumerate(zip(few, more, strict=True)) if a.size == b.size and b.given > a.given]
    for i in ones:
        if few[i].drawn and not _empty(few[i]):
            return f"{few[i].name} makes one value of several rows"
    twice = again() if ones else few
    if len(twice) != len(few):
        return "another number of rows takes other operations"
    for i in ones:
        if not _alike(few[i].value, twice[i].value):
            return f"{few[i].name} makes one value of several rows"
    return ""


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _empty(result: Result) -> bool:
    """Whether it gave a tensor without numbers, as kernels do for what is not asked for."""
    return isinstance(result.value, Tensor) and not result.value.numel()


def _alike(one: Tensor | Number | None, other: Tensor | Number | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_floating_point():
            return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, equal_nan=True)
        return torch.equal(one, other)
    return one is not None and one == other
