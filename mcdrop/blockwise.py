"""Attention with given masks in blocks on a GPU: a kernel in triton that writes down no weight of a step for a step.

Memory holds queries, keys, values and masks alone; scores, their softmax and its product with a mask stay in registers,
and a softmax over many blocks is corrected as larger scores come (Dao et al. 2022, algorithm 1). torch's own fused
attention draws its masks itself, and takes none that multiplies.
"""

from __future__ import annotations  # those of the kernel are names that are there on a GPU only

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mcdrop.masking import runs_on

__all__ = ["attend", "takes"]

_MATMUL: Any = torch.backends.cuda.matmul
_MOST_UNITS = 128  # of one head: more do not fit into the memory of a processor
_CLOSE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # float32 may be multiplied in tf32


@cache
def takes(device: torch.device, dtype: torch.dtype, units: int, others: int) -> bool:
    """Whether the kernel runs on a device, for queries of so many units a head and values of so many others."""
    if not runs_on(device) or dtype not in _CLOSE or max(units, others) > _MOST_UNITS:
        return False
    generator = torch.Generator().manual_seed(0)
    query, keys, values, mask = (
        torch.randn(1, 1, 1, *shape, generator=generator).to(device, dtype)
        for shape in ((64, units), (units, 64), (64, others), (64, 64))
    )
    try:
        with torch.no_grad():
            found = attend(query, keys, values, mask, units**-0.5, None)
            expected = _one_by_one(query, keys, values, mask, units**-0.5, None)
    except Exception:  # a device that is too small, or that triton does not compile for
        return False
    return bool((found - expected).abs().max() < _CLOSE[dtype] * expected.abs().max())


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """Gives softmax(query keys scale + bias) times a mask times values: (T, N, H, L, E).

    Queries are (T, N, H, L, D), keys (T, N, H, D, S) and values (T, N, H, S, E), each with or without T; the mask is
    (T, 1, H, L, S), the bias is spread to (T, N, H, L, S). float32 is multiplied in tf32 where torch's switch says so.
    """
    passes, (rows, heads, steps, _), others = len(mask), query.shape[-4:], values.shape[-1]
    whole = (passes, rows, heads, steps, keys.shape[-1])
    if 0 in whole:
        return _one_by_one(query, keys, values, mask, scale, bias)
    # as what comes next wants it: heads side by side
    output = values.new_empty((passes, rows, steps, heads, others)).transpose(2, 3)
    each = [one.expand(passes, -1, -1, -1, -1) for one in (query, keys, values)]
    _launch([*each, mask, output, None if bias is None else bias.expand(whole)], whole, scale)
    return output


def _one_by_one(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """Gives the same as torch does it."""
    scores = query @ keys * scale
    return (scores if bias is None else scores + bias).softmax(-1) * mask @ values


def _launch(given: Sequence[Any], whole: tuple[int, ...], scale: float) -> None:
    import triton

    passes, rows, heads, steps, seen = whole
    query, _, values, *_ = given
    units, others = query.shape[-1], values.shape[-1]
    wide, deep = (max(16, triton.next_power_of_2(size)) for size in (units, others))
    # wider ones of 64 find no room; and triton 3.6 multiplies these wrongly where it cannot read in large pieces
    most = 64 if all(map(_in_large_pieces, given[:3])) and query.itemsize * max(wide, deep) <= 256 else 32
    block, part = (max(16, min(most, triton.next_power_of_2(size))) for size in (steps, seen))
    digits = "tf32" if _MATMUL.fp32_precision == "tf32" else "ieee"
    strides = [(0,) * 5 if one is None else one.stride() for one in given]
    with torch.cuda.device(query.device):
        _compiled()[(passes * rows * heads, triton.cdiv(steps, block))](
            *given, *strides, rows, heads, steps, seen, scale, units, others, digits, wide, deep, block, part,
            num_stages=2,
        )  # fmt: skip


def _in_large_pieces(tensor: Tensor) -> bool:
    """Whether a tensor's units lie one after another, from places that divide by 16."""
    return tensor.data_ptr() % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in tensor.stride())


@cache
def _compiled() -> Any:
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_kernel)


tl: Any = None  # which the kernel is written in; only where there is a GPU


def _kernel(  # type: ignore[no-untyped-def]
    query, keys, values, mask, output, bias, of_query, of_keys, of_values, of_mask, of_output, of_bias, rows, heads,
    steps, seen, scale, UNITS: tl.constexpr, OTHERS: tl.constexpr, DIGITS: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    t, n, h = head // (rows * heads), head // heads % rows, head % heads
    query += t * of_query[0] + n * of_query[1] + h * of_query[2]
    keys += t * of_keys[0] + n * of_keys[1] + h * of_keys[2]
    values += t * of_values[0] + n * of_values[1] + h * of_values[2]
    output += t * of_output[0] + n * of_output[1] + h * of_output[2]
    mask += t * of_mask[0] + h * of_mask[2]
    unit, out = tl.arange(0, WIDE), tl.arange(0, DEEP)[None, :]
    step = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    there = (step < steps) & (unit[None, :] < UNITS)
    own = tl.load(query + step * of_query[3] + unit[None, :] * of_query[4], mask=there, other=0)
    top, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK, DEEP], tl.float32)
    for begin in range(0, seen, PART):
        other = (begin + tl.arange(0, PART)).to(tl.int64)
        at, inside = other[None, :], (step < steps) & (other[None, :] < seen)
        of_head = (unit[:, None] < UNITS) & (at < seen)
        key = tl.load(keys + unit[:, None] * of_keys[3] + at * of_keys[4], mask=of_head, other=0)
        score = tl.dot(own, key, input_precision=DIGITS) * scale
        if bias is not None:
            place = t * of_bias[0] + n * of_bias[1] + h * of_bias[2] + step * of_bias[3] + at * of_bias[4]
            score += tl.load(bias + place, mask=inside, other=0).to(tl.float32)
        score = tl.where(at < seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)[:, None]  # where all so far is hidden
        weight, shrink = tl.exp(score - level), tl.exp(top[:, None] - level)
        total, top = total * tl.sum(shrink, 1) + tl.sum(weight, 1), higher
        weight *= tl.load(mask + step * of_mask[3] + at * of_mask[4], mask=inside, other=0).to(tl.float32)
        of_value = (other[:, None] < seen) & (out < OTHERS)
        value = tl.load(values + other[:, None] * of_values[3] + out * of_values[4], mask=of_value, other=0)
        found = found * shrink + tl.dot(weight.to(value.dtype), value, input_precision=DIGITS)
    found = (found / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + step * of_output[3] + out * of_output[4], found, mask=(step < steps) & (out < OTHERS))
