"""The specification of a step's attention: plain PyTorch, which waits for no device and has fixed shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def target_attention(
    query: Tensor,  # [R, H, d]
    key: Tensor,
    value: Tensor,
    keys: Tensor,  # [C, H, T, d]
    values: Tensor,
    places: Tensor,  # [R, T] int32
    position: Tensor,  # [1] int32
) -> Tensor:
    rows, positions = places.shape
    at = position.long()
    keys[:rows].index_copy_(2, at, key[:, :, None])
    values[:rows].index_copy_(2, at, value[:, :, None])
    places.index_copy_(1, at, torch.arange(rows, dtype=places.dtype, device=places.device)[:, None])
    t = torch.arange(positions, device=places.device)
    seen = (t <= position).expand(rows, -1)
    lies = torch.where(seen, places, 0).long()
    return _attend(query[:, None], keys[lies, :, t], values[lies, :, t], seen)[:, 0]


def source_attention(
    query: Tensor,  # [B, K, H, d]
    keys: Tensor,  # [C, H, S, d]
    values: Tensor,
    sources: Tensor,  # [B] int32
    lengths: Tensor,  # [C] int32
) -> Tensor:
    sources = sources.long()
    seen = torch.arange(keys.shape[2], device=keys.device) < lengths[sources][:, None]
    return _attend(query, keys[sources].transpose(1, 2), values[sources].transpose(1, 2), seen)


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """query [R, M, H, d], keys and values [R, T, H, d], seen bool [R, T] -> [R, M, H, d]; the unseen may be NaN."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.einsum("rmhd,rthd->rhmt", query.to(wide), keys.to(wide)) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    values = torch.where(seen[:, :, None, None], values.to(wide), 0)
    return torch.einsum("rhmt,rthd->rmhd", weights, values).to(query.dtype)
