"""The conditional masked language model's training loss (Ghazvininejad 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast.data.batching import ParallelBatch
from condgen_fast.models.cmlm import CMLM
from condgen_fast.ops import kd_loss
from condgen_fast.ops.refinement import remask


def mask_uniformly(target: Tensor, maskable: Tensor) -> Tensor:
    """Positions to mask: for each row a number uniform in 1 … its maskable positions, then that many at random.

    target [B, T] int64, maskable [B, T] bool -> bool [B, T]. The fully masked canvas, from which decoding starts, is
    drawn with probability 1/N (the paper's definition; the published code never draws it).
    """
    inner = maskable.sum(1)
    count = (torch.rand(inner.shape, device=target.device) * inner).long() + 1
    scores = torch.rand(target.shape, device=target.device)
    return remask(scores, count.minimum(inner), maskable=maskable)


def cmlm_loss(
    model: CMLM, batch: ParallelBatch, *, label_smoothing: float = 0.1, length_weight: float = 0.1
) -> dict[str, Tensor]:
    """Cross-entropy of the masked tokens plus `length_weight` times that of the length, each a mean over its own rows.

    L = -(1/|M|) sum_{t in M} log p(y_t | y_obs, x) - w (1/B) sum_b log p(N_b | x_b).
    """
    target = batch.target  # [B, T] bos … eos
    maskable = (target != model.pad_id) & (target != model.bos_id) & (target != model.eos_id)
    masked = mask_uniformly(target, maskable)
    canvas = target.masked_fill(masked, model.mask_id)
    hidden, offset_logits = model(batch.source, batch.source_lengths, canvas)
    tokens = kd_loss(model.project(hidden[masked]), None, target[masked], alpha=0.0, label_smoothing=label_smoothing)
    radius = model.config.length_offset
    # An empty source counts one position: the one the encoder shows for it.
    offset = (maskable.sum(1) - batch.source_lengths.clamp(min=1)).clamp(-radius, radius) + radius
    length = kd_loss(offset_logits, None, offset, alpha=0.0)
    return {"loss": tokens + length_weight * length, "tokens": tokens, "length": length}
