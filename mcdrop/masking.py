"""What follows a layer on a GPU, in one pass over the memory, by kernels in triton: norm, sum, ReLU and mask.

torch's product of values (T, N, D) with a mask (T, 1, D) reads and writes memory at a third of its speed, and a ReLU
before it goes over all of it once more; together that was 42 % of the time of a small network. It adds the bias of a
convolution just as slowly, and folding a norm into the weights takes six small kernels a layer; with sums and masks
these were 30 % of a residual network. Around attention it is a mask, a sum and a norm of layers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DTYPES", "WIDEST", "after_conv", "masked", "runs_on", "summed"]

DTYPES = {torch.bfloat16, torch.float16, torch.float32}  # it computes in float32

WIDEST = 8192  # numbers that a norm of layers is over: they stay in registers

_BLOCK = 1024
_MOST = 2**31 - _BLOCK  # numbers of a pass: places are counted in 32 bits


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device."""
    if device.type != "cuda":
        return False
    try:
        x, mask = torch.tensor([[[-1.0, 2.0]]], device=device), torch.tensor([[[3.0, 3.0]]], device=device)
        with torch.no_grad():
            return bool((masked(x, mask, 0, True) == torch.tensor([0.0, 6.0], device=device)).all())
    except Exception:  # no triton, no compiler for what it writes, or a device too old for it
        return False


def masked(x: Tensor, mask: Tensor, trailing: int, relu: bool) -> Tensor:
    """Gives the product of values (T, N, units, places), or (N, units, places) for all passes, and a mask.

    The mask is (T, 1, units, 1), both with any number of axes for the units and ``trailing`` ones for the places.
    ``relu`` takes that of the values first.
    """
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    passes, places = shape[0], shape[len(shape) - trailing :].numel()
    if not x.numel() or shape.numel() // passes > _MOST:
        return (x.relu() if relu else x) * mask
    output = x.new_empty(shape)
    _launch(x.contiguous(), mask.contiguous(), output, passes, mask.numel() // passes, places, relu)
    return output


def after_conv(
    x: Tensor, axes: int, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, gain: Tensor | None,
    shift: Tensor | None, eps: float, other: Tensor | None, relu: bool, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gives what follows the outputs of a convolution: bias, norm in eval, sum, ReLU and mask, each where it is given.

    Values and ``other`` are (..., channels, places), with ``axes`` ones for the places; the mask is as in ``masked``.
    """
    shape = x.shape if mask is None else torch.broadcast_shapes(x.shape, mask.shape)
    passes = shape[0] if len(shape) > axes + 2 else 1
    channels, places = shape[len(shape) - axes - 1], shape[len(shape) - axes :].numel()
    if not x.numel() or shape.numel() // passes > _MOST:
        return _one_by_one(x, axes, bias, mean, variance, gain, shift, eps, other, relu, mask)
    if last := not x.is_contiguous() and x.movedim(-axes - 1, -1).is_contiguous():  # as cudnn likes bfloat16
        x, places = x.movedim(-axes - 1, -1), 1
        other = None if other is None else other.movedim(-axes - 1, -1)
        shape = torch.Size((*shape[: -axes - 1], *shape[len(shape) - axes :], channels))
    output = x.new_empty(shape)
    mask, *given = (
        None if one is None else one.contiguous() for one in (mask, bias, mean, variance, gain, shift, other)
    )
    _launch(x.contiguous(), mask, output, passes, channels, places, relu, eps, given)
    return output.movedim(-1, -axes - 1) if last else output


def summed(
    x: Tensor, mask: Tensor, other: Tensor, norm: bool, gain: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """Gives the product of values (T, N, ..., D) and a mask (T, 1, ..., D), plus ``other``, and its ``norm`` over D.

    Values and ``other`` may be those of all passes, (N, ..., D).
    """
    shape = torch.broadcast_shapes(x.shape, mask.shape, other.shape)
    inner = shape[1:].numel()
    if not shape.numel() or inner > _MOST:
        whole = x * mask + other
        return F.layer_norm(whole, shape[-1:], gain, shift, eps) if norm else whole
    import triton

    output, wide = x.new_empty(shape), triton.next_power_of_2(shape[-1])
    given = [None if one is None else one.contiguous() for one in (x, mask, other, gain, shift)]
    lines, together = inner // shape[-1], max(1, _BLOCK // wide)
    with torch.cuda.device(x.device):
        _sum_kernel()[(shape[0] * triton.cdiv(lines, together),)](
            *given, output, lines, mask.numel() // shape[0] // shape[-1], eps, shape[-1], norm, x.dim() < len(shape),
            other.dim() < len(shape), together, wide,
        )  # fmt: skip
    return output


def _one_by_one(
    x: Tensor, axes: int, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, gain: Tensor | None,
    shift: Tensor | None, eps: float, other: Tensor | None, relu: bool, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gives the same as torch does it."""

    def channels(one: Tensor) -> Tensor:
        return one.view(-1, *(1,) * axes)

    x = x if bias is None else x + channels(bias)
    if mean is not None and variance is not None:
        x = (x - channels(mean)) * channels(torch.rsqrt(variance + eps))
        x = x if gain is None else x * channels(gain)
        x = x if shift is None else x + channels(shift)
    x = x if other is None else x + other
    x = x.relu() if relu else x
    return x if mask is None else x * mask


def _launch(
    x: Tensor, mask: Tensor | None, output: Tensor, passes: int, units: int, places: int, relu: bool, eps: float = 0.0,
    others: Sequence[Tensor | None] = (None,) * 6,
) -> None:  # fmt: skip
    import triton

    inner = output.numel() // passes
    with torch.cuda.device(x.device):
        _kernel()[(passes * triton.cdiv(inner, _BLOCK),)](
            x, mask, output, *others, inner // (units * places), eps, units, places, x.numel() < output.numel(), relu,
            _BLOCK,
        )  # fmt: skip


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def kernel(  # type: ignore[no-untyped-def]  # triton takes no other annotations than its own
        x, mask, output, bias, mean, variance, gain, shift, other, rows, eps, UNITS: tl.constexpr,
        PLACES: tl.constexpr, SHARED: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        inner = rows * (UNITS * PLACES)  # so that it is known to divide by 16, and memory is read in large pieces
        blocks = tl.cdiv(inner, BLOCK)
        start = (tl.program_id(0) // blocks).to(tl.int64)
        within = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside, unit = within < inner, within // PLACES % UNITS
        place = within if SHARED else start * inner + within
        value = tl.load(x + place, mask=inside).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + unit, mask=inside).to(tl.float32)
        if variance is not None:
            scale = tl.rsqrt(tl.load(variance + unit, mask=inside, other=1.0).to(tl.float32) + eps)
            if gain is not None:
                scale *= tl.load(gain + unit, mask=inside).to(tl.float32)
            value = (value - tl.load(mean + unit, mask=inside).to(tl.float32)) * scale
            if shift is not None:
                value += tl.load(shift + unit, mask=inside).to(tl.float32)
        if other is not None:
            value += tl.load(other + place, mask=inside).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # not the larger one, which would hide that there is no number
        if mask is not None:
            value *= tl.load(mask + start * UNITS + unit, mask=inside).to(tl.float32)
        tl.store(output + start * inner + within, value.to(output.dtype.element_ty), mask=inside)

    return triton.jit(kernel, do_not_specialize=["rows"])  # other numbers of rows must not compile anew


@cache
def _sum_kernel() -> Any:
    import triton
    import triton.language as tl

    def kernel(  # type: ignore[no-untyped-def]
        x, mask, other, gain, shift, output, lines, steps, eps, WIDTH: tl.constexpr, NORM: tl.constexpr,
        SHARED: tl.constexpr, OTHER_SHARED: tl.constexpr, LINES: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        blocks = tl.cdiv(lines, LINES)
        start = (tl.program_id(0) // blocks).to(tl.int64)
        line, unit = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)[:, None], tl.arange(0, WIDE)[None, :]
        inside = (line < lines) & (unit < WIDTH)
        within = line * WIDTH + unit
        place = start * lines * WIDTH + within
        value = tl.load(x + (within if SHARED else place), mask=inside, other=0.0).to(tl.float32)
        factor = mask + start * steps * WIDTH + line % steps * WIDTH + unit
        value *= tl.load(factor, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(other + (within if OTHER_SHARED else place), mask=inside, other=0.0).to(tl.float32)
        if NORM:
            apart = tl.where(inside, value - (tl.sum(value, 1) / WIDTH)[:, None], 0.0)
            value = apart * tl.rsqrt(tl.sum(apart * apart, 1) / WIDTH + eps)[:, None]
            if gain is not None:
                value *= tl.load(gain + unit, mask=unit < WIDTH).to(tl.float32)
            if shift is not None:
                value += tl.load(shift + unit, mask=unit < WIDTH).to(tl.float32)
        tl.store(output + place, value.to(output.dtype.element_ty), mask=inside)

    return triton.jit(kernel, do_not_specialize=["lines"])
