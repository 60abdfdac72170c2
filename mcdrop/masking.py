"""Masks on a GPU: an activation and its mask in one pass over the memory, by a kernel in triton.

torch's product of values (T, N, D) with a mask (T, 1, D) reads and writes memory at a third of its speed, and a ReLU
before it goes over all of it once more; together that was 42 % of the time of a small network.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "masked", "runs_on"]

DTYPES = {torch.bfloat16, torch.float16, torch.float32}  # it computes in float32

_BLOCK = 1024
_MOST_BLOCKS = 65_535  # of a grid's second axis


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device."""
    if device.type != "cuda":
        return False
    try:
        x, mask = torch.tensor([[[-1.0, 2.0]]], device=device), torch.tensor([[[3.0, 3.0]]], device=device)
        with torch.no_grad():
            return bool((_launched(x, mask, (1, 1, 2), 1, relu=True) == torch.tensor([0.0, 6.0], device=device)).all())
    except Exception:  # no triton, no compiler for what it writes, or a device too old for it
        return False


def masked(x: Tensor, mask: Tensor, trailing: int, relu: bool) -> Tensor:
    """Gives the product of values (T, N, units, places), or (N, units, places) for all passes, and a mask.

    The mask is (T, 1, units, 1), both with any number of axes for the units and ``trailing`` ones for the places.
    ``relu`` takes that of the values first.
    """
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    inner = x.numel() if x.dim() < len(shape) else x.numel() // shape[0]
    if not inner or inner > _BLOCK * _MOST_BLOCKS:
        return (x.relu() if relu else x) * mask
    places = shape[len(shape) - trailing :].numel() if trailing else 1
    return _launched(x.contiguous(), mask.contiguous(), tuple(shape), places, relu=relu)


def _launched(x: Tensor, mask: Tensor, shape: tuple[int, ...], places: int, *, relu: bool) -> Tensor:
    import triton

    output, passes = x.new_empty(shape), shape[0]
    inner, units = output.numel() // passes, mask.numel() // passes
    with torch.cuda.device(x.device):
        _kernel()[passes, triton.cdiv(inner, _BLOCK)](
            x, mask, output, inner // (units * places), units, places, x.dim() < len(shape), relu, _BLOCK
        )
    return output


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def kernel(  # type: ignore[no-untyped-def]  # triton takes no other annotations than its own
        x, mask, output, rows, UNITS: tl.constexpr, PLACES: tl.constexpr, SHARED: tl.constexpr, RELU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0).to(tl.int64)
        inner = rows * (UNITS * PLACES)  # so that it is known to divide by 16, and memory is read in large pieces
        within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = within < inner
        value = tl.load(x + within if SHARED else x + start * inner + within, mask=inside).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # not the larger one, which would hide that there is no number
        factor = tl.load(mask + start * UNITS + within // PLACES % UNITS, mask=inside).to(tl.float32)
        tl.store(output + start * inner + within, (value * factor).to(output.dtype.element_ty), mask=inside)

    return triton.jit(kernel, do_not_specialize=["rows"])  # other numbers of rows must not compile anew
