"""Calling a network: rows become tensors of its device and type, and the picked output comes back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcdrop.digits import WIDE
from mcdrop.errors import InputError, MCDropError
from mcdrop.intercept import Expected, Interception
from mcdrop.outputs import Pick
from mcdrop.quiet import first_line
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.volatile import from_start

__all__ = [
    "Outputs",
    "as_numpy",
    "draws_off",
    "forward",
    "may_fail",
    "moved",
    "out_of_memory",
    "place_of",
    "placed",
    "said_of",
    "to_tensors",
    "using",
]

Outputs = NDArray[np.floating[Any]]

_OUT_OF_MEMORY = ("not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def to_tensors(rows: Rows, module: nn.Module) -> Rows:
    """Gives tensors on the module's device, floating leaves in the module's floating type."""
    return placed(rows, *place_of([*module.parameters(), *module.buffers()]))


def place_of(state: Sequence[Tensor]) -> tuple[torch.device, torch.dtype]:
    """Gives the device and the floating type of a network with such weights and buffers.

    It is the type of the first weight, or buffer where there is none; masks of double precision that a network keeps
    among its weights and does not train, as Masksembles do, tell it only where all weights are so.
    """
    device = state[0].device if state else torch.device("cpu")
    floating = [one for one in state if one.is_floating_point()]
    weights = (one for one in floating if isinstance(one, nn.Parameter))
    telling = (one for one in weights if one.requires_grad or one.dtype != torch.float64)
    first = next(telling, floating[0] if floating else None)
    return device, torch.get_default_dtype() if first is None else first.dtype


def moved(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Puts a network on a device.

    Raises:
        InputError: the device cannot be used.
    """
    with using(device) as there:
        return module.to(there)


@contextmanager
def using(device: str | torch.device) -> Iterator[torch.device]:
    """Gives a device to move a network to.

    Raises:
        InputError: it is not there, holds no numbers, or its memory is out.
    """
    try:
        there = torch.device(device)
        torch.zeros(1, device=there).cpu()
        yield there
    except (RuntimeError, AssertionError) as error:
        named = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        said = f"device {str(device)!r} cannot be used ({first_line(error)}); there is: {', '.join(named)}"
        raise InputError(said) from None


def placed(rows: Rows, device: torch.device, dtype: torch.dtype) -> Rows:
    """Gives tensors on a device, floating leaves in a type; a tensor that is so already is the user's own.

    What runs a network gives it a copy, since a network may write to its input: see ``forward``.
    """
    for leaf in rows.leaves:
        there = isinstance(leaf, Tensor) and leaf.device == device
        if not there or (leaf.dtype != dtype and leaf.is_floating_point()):
            break
    else:
        return rows

    def convert(leaf: Any) -> Tensor:
        tensor = leaf if isinstance(leaf, Tensor) else torch.from_numpy(_plain(leaf))
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return rows.map(convert)


def forward(module: nn.Module, rows: Rows, pick: Pick) -> Tensor:
    """Runs the module on its own copy of the rows and gives the picked output, (N, ...)."""
    args = tuple(leaf.clone() for leaf in rows.args)
    kwargs = {name: leaf.clone() for name, leaf in rows.kwargs.items()}
    with from_start(module):
        output = pick(module(*args, **kwargs))
    if output.dtype == torch.bool:
        output = output.float()
    if rows.count == 1 and output.shape[:1] != (1,):  # squeezed, which takes away the axis of a single row
        output = output.unsqueeze(0)
    return output.unsqueeze(-1) if output.dim() == 1 else output


def _plain(leaf: Any) -> Any:
    """An array as torch can read it: in memory of its own order, in the machine's byte order, at most 64 bits wide."""
    array = np.array(leaf, order="C")
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 8
    return array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)


def draws_off(module: nn.Module, rows: Rows, pick: Pick) -> Tensor:
    """Runs the module with every draw at its expectation, also those that it makes in eval, (N, ...)."""
    with Interception(Expected(), RULES):
        return forward(module, rows, pick)


class said_of:
    """Turns a network's own error into one that says what it was given.

    A class, because every chunk of passes enters it, and a generator would cost twice as much.
    """

    __slots__ = ("_rows",)

    def __init__(self, rows: Rows) -> None:
        """Takes what the network is given."""
        self._rows = rows

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Says what was given, where the error is the network's, which may raise anything, such as of an assertion."""
        if not isinstance(error, Exception) or isinstance(error, MCDropError) or out_of_memory(error):
            return
        names = self._rows.names or [name for name, _ in self._rows.named()]
        shapes = ", ".join(f"{name}: {tuple(leaf.shape)}" for name, leaf in zip(names, self._rows.leaves, strict=True))
        raise InputError(f"the network cannot take inputs of shape {shapes}: {first_line(error)}") from error


def as_numpy(output: Outputs | Tensor) -> Outputs:
    """Gives outputs as an array: of float64 where float32 would round them."""
    if isinstance(output, np.ndarray):
        return output
    there = output.is_cpu and output.dtype in (torch.float32, torch.float64)
    array: Outputs = (
        (output if there else output.to("cpu", torch.float64 if output.dtype in WIDE else torch.float32))
        .detach()
        .numpy()
    )
    return array


@contextmanager
def may_fail() -> Iterator[None]:
    """Ends quietly where a network fails, which may raise anything; not where memory is out."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise


def out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator, the driver and the libraries on a GPU only say so."""
    said = any(words in str(error) for words in _OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)
