"""Passes summed up where they are: few rows leave a GPU instead of all outputs."""

import torch
from torch import Tensor

from mcdrop.moments import Summing

__all__ = ["summed_up"]


def summed_up(outputs: Tensor, how: Summing) -> Tensor:
    """Gives, in float64, the first pass, the sum of squared differences from it, and three rows of each level.

    These are the sums over whole blocks and over their squares, and over what is left; of independent passes there is
    one row, the sum over all.
    """
    values = how.of(outputs.double())
    first = values[0] if how.first is None else torch.as_tensor(how.first, device=values.device)
    parts = values - first
    rows = [first, parts.square().sum(0)]
    for left_out, size in how.levels:
        parts = parts[left_out:]
        whole = len(parts) // size
        blocks = parts[: whole * size].unflatten(0, (whole, size)).sum(1)
        rows += [blocks.sum(0), blocks.square().sum(0), parts[whole * size :].sum(0)]
        parts = blocks
    return torch.stack(rows if how.levels else [*rows, parts.sum(0)])
