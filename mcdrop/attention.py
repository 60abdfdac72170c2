"""Attention without a draw as one operation of a captured program, which is torch's own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ATTENTION", "in_groups", "run_attention"]


@torch.library.custom_op("mcdrop::attention", mutates_args=())
def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    return run_attention(query, keys, values, mask, causal, scale)


@_attention.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:  # fmt: skip
    lead = [
        next((size for size in sizes if not isinstance(size, int) or size != 1), 1)
        for sizes in zip(*(one.shape[:-2] for one in (query, keys, values)), strict=True)
    ]
    return query.new_empty((*lead, query.shape[-2], values.shape[-1]))


def _attention_batched(
    info: Any, dims: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool,
    scale: float | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """All have the same axes, and get one more in front; a mask where it differs from pass to pass."""
    if mask is not None and dims[:3] == (None,) * 3:  # the mask alone differs
        query, dims = query.expand(info.batch_size, *query.shape), (0, *dims[1:])
    given = zip((query, keys, values), dims[:3], strict=True)
    query, keys, values = (one.unsqueeze(0) if dim is None else one.movedim(dim, 0) for one, dim in given)
    if mask is not None and dims[3] is not None:
        mask = mask.movedim(dims[3], 0)
        for _ in range(query.dim() - mask.dim()):
            mask = mask.unsqueeze(1)
    return _attention(query, keys, values, mask, causal, scale), 0


_attention.register_vmap(_attention_batched)

ATTENTION = torch.ops.mcdrop.attention.default


def in_groups(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gives keys and values a head for each of the queries, which groups of them share."""
    groups = query.shape[-3] // keys.shape[-3]
    return keys.repeat_interleave(groups, -3), values.repeat_interleave(groups, -3)


def run_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Gives torch's attention of (..., L, D), (..., S, D) and (..., S, E); all axes but the last three are made one."""
    if query.dim() <= 4:
        return F.scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, scale=scale)
    lead = torch.broadcast_shapes(*(one.shape[:-3] for one in (query, keys, values)))
    if mask is not None and mask.dim() > 3:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    query, keys, values = (one.expand(*lead, *one.shape[-3:]).flatten(0, -4) for one in (query, keys, values))
    output = F.scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, scale=scale)
    return output.view(*lead, *output.shape[1:])
