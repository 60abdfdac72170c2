"""Whether two computations differ but for the order of sums.

Threads add up in no fixed order in some of torch's kernels, such as ``scatter_add`` on a GPU or
``index_put(accumulate=True)`` on a CPU: the last digits differ from call to call. What hardly differs is run again with
torch's deterministic algorithms, where such sums are the same to the bit, and what is drawn out of sight is not.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from mcdrop.agreement import distance
from mcdrop.digits import tolerance
from mcdrop.quiet import ALONE

__all__ = ["apart", "repeats"]

_NEAR = 1e-3  # a small output of large sums has fewer digits than others; a look too many does no harm
_LOOKS = 4  # at what may be alike by chance

_Output = TypeVar("_Output")
_Values = Sequence[Tensor]


@contextmanager
def _one_order() -> Iterator[None]:
    """In which torch adds up in one order, as far as it can; a switch of the whole process."""
    before = _switch()
    with ALONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it cannot add up so
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            if _switch() == (True, True):  # else another thread has set it meanwhile
                torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


def _switch() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def apart(
    one: _Output, other: _Output, again: tuple[Callable[[], _Output], Callable[[], _Output]],
    values: Callable[[_Output], _Values],
) -> bool:  # fmt: skip
    """Whether two computations gave other ``values``, and not for the order of sums alone; ``again`` runs each anew."""
    off = distance(values(one), values(other))
    return _differ([*again], values) if 0 < off <= _near(values(one)) else off > 0


def repeats(first: _Output, again: Callable[[], _Output], values: Callable[[_Output], _Values], *, looks: int) -> bool:
    """Whether so many looks more at a computation give the same ``values``, but for the order of sums."""
    worst = max(distance(values(first), values(again())) for _ in range(looks))
    return not _differ([again], values) if 0 < worst <= _near(values(first)) else worst == 0


def _differ(runs: Sequence[Callable[[], _Output]], values: Callable[[_Output], _Values]) -> bool:
    with _one_order():
        first = values(runs[0]())
        return any(distance(first, values(run())) > 0 for _ in range(_LOOKS) for run in runs[::-1])


def _near(values: _Values) -> float:
    return max((tolerance(one.dtype) for one in values if one.dtype.itemsize == 2), default=_NEAR)
