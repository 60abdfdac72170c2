"""Passes summed up where they are: few rows leave a GPU instead of all outputs.

On a GPU one kernel in triton makes all sums: as torch's operations they were some fifteen small kernels, half of what a
small network takes there.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcdrop.masking import runs_on
from mcdrop.moments import Summing

__all__ = ["summed_up"]

_COLUMNS = 32
_TILE = 128  # passes that are looked at together


class _Level(NamedTuple):
    """Passes from ``begin`` to ``end`` are whole blocks of a size; those from there to ``limit`` are left over."""

    begin: int
    end: int
    limit: int
    size: int


def summed_up(outputs: Tensor, how: Summing) -> Tensor:
    """Gives, in float64, the first pass, the sum of squared differences from it, and three rows of each level.

    These are the sums over whole blocks and over their squares, and over what is left; of independent passes there is
    one row, the sum over all.
    """
    values = how.of(outputs)
    first = None if how.first is None else torch.as_tensor(how.first, device=values.device)
    levels = _levels(len(values), how.levels)
    if values.numel() and runs_on(values.device) and _in_tiles(levels):
        return _by_kernel(values, first, levels)
    values = values.double()
    first = values[0] if first is None else first
    parts = values - first
    rows = [first, parts.square().sum(0)]
    for left_out, size in how.levels:
        parts = parts[left_out:]
        whole = len(parts) // size
        blocks = parts[: whole * size].unflatten(0, (whole, size)).sum(1)
        rows += [blocks.sum(0), blocks.square().sum(0), parts[whole * size :].sum(0)]
        parts = blocks
    return torch.stack(rows if how.levels else [*rows, parts.sum(0)])


def _levels(passes: int, levels: tuple[tuple[int, int], ...]) -> list[_Level]:
    """Says of each level which passes it is of; parts of one are whole blocks of the one before."""
    found: list[_Level] = []
    begin, limit, unit = 0, passes, 1
    for left_out, size in levels:
        begin, unit = begin + left_out * unit, unit * size
        end = begin + max(0, limit - begin) // unit * unit
        found.append(_Level(begin, end, limit, unit))
        limit = end
    return found


def _in_tiles(levels: list[_Level]) -> bool:
    """Whether no block of any level lies across the edge of a tile, and the kernel has as many levels."""
    return len(levels) in (0, 2) and all(_TILE % one.size == 0 == one.begin % one.size for one in levels)


def _by_kernel(values: Tensor, first: Tensor | None, levels: list[_Level]) -> Tensor:
    import triton

    shape, columns, tiles = values.shape[1:], values.shape[1:].numel(), triton.cdiv(len(values), _TILE)
    output = values.new_empty((tiles, max(3, 2 + 3 * len(levels)), *shape), dtype=torch.float64)
    small, large = levels or [_Level(0, len(values), len(values), 1)] * 2  # each a block of its own
    given = None if first is None else first.contiguous()
    with torch.cuda.device(values.device):
        _kernel()[(triton.cdiv(columns, _COLUMNS), tiles)](
            values.contiguous(), given, output, len(values), columns, small.end, *large[:3], bool(levels), small.size,
            large.size, _TILE, _COLUMNS,
        )  # fmt: skip
    return output[0] if tiles == 1 else output.sum(0)


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    level = _level()

    def kernel(  # type: ignore[no-untyped-def]  # triton takes no other annotations than its own
        values, first, output, passes, columns, small_end, begin, end, limit, LEVELS: tl.constexpr, SMALL: tl.constexpr,
        LARGE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        tile, width = tl.program_id(1), columns.to(tl.int64)
        column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        number, inside = tile * TILE + tl.arange(0, TILE)[:, None], column < width
        start = tl.load((values if first is None else first) + column, mask=inside, other=0.0).to(tl.float64)
        there = (number < passes) & inside[None, :]
        value = tl.load(values + number.to(tl.int64) * width + column[None, :], mask=there, other=0.0)
        apart = tl.where(there, value.to(tl.float64) - start[None, :], 0.0)
        output += tile.to(tl.int64) * (8 if LEVELS else 3) * width + column
        tl.store(output, tl.where(tile == 0, start, 0.0), mask=inside)  # tiles are added up
        tl.store(output + width, tl.sum(apart * apart, 0), mask=inside)
        if LEVELS:
            level(apart, number, output + 2 * width, 0, small_end, passes, inside, width, SMALL, TILE, COLUMNS)
            level(apart, number, output + 5 * width, begin, end, limit, inside, width, LARGE, TILE, COLUMNS)
        else:
            tl.store(output + 2 * width, tl.sum(apart, 0), mask=inside)

    # other numbers of passes or columns must not compile anew
    return triton.jit(kernel, do_not_specialize=["passes", "columns", "small_end", "begin", "end", "limit"])


@cache
def _level() -> Any:
    """Stores the three rows of a level: sums over whole blocks, over their squares, and over what is left."""
    import triton
    import triton.language as tl

    def level(  # type: ignore[no-untyped-def]
        apart, number, output, begin, end, limit, inside, width, SIZE: tl.constexpr, TILE: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        whole = tl.where((number >= begin) & (number < end), apart, 0.0)
        blocks = tl.sum(tl.reshape(whole, [TILE // SIZE, SIZE, COLUMNS]), 1)
        left = tl.where((number >= end) & (number < limit), apart, 0.0)
        tl.store(output, tl.sum(blocks, 0), mask=inside)
        tl.store(output + width, tl.sum(blocks * blocks, 0), mask=inside)
        tl.store(output + 2 * width, tl.sum(left, 0), mask=inside)

    return triton.jit(level)
