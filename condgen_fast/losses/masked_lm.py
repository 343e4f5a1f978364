"""The masked-diffusion language model's training loss on prompts and responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from condgen_fast.data.batching import ParallelBatch
from condgen_fast.losses.cmlm import mask_uniformly
from condgen_fast.models.masked_lm import MaskedLM
from condgen_fast.ops import kd_loss


class PromptedCanvas(NamedTuple):
    """Whole texts as decoding fills them: prompt, response, and eos to where the masks would end."""

    tokens: Tensor  # [B, W] int64, padded on the right
    maskable: Tensor  # [B, W] bool: what is learned in this update


def prompted_canvas(model: MaskedLM, batch: ParallelBatch) -> PromptedCanvas:
    """Each source, its target without bos, and further eos.

    As many eos follow as fill the last block of a block-causal model; of one that sees everything, at random up to
    what `BlockDiffusion` appends to the prompt by default, or else the number of masks would tell the length. Of a
    block-causal model one block of the response, at random, is learned; what follows it is cut off.
    """
    prompt, given = batch.source_lengths[:, None], batch.target_lengths[:, None] - 1
    if model.block_length is None:
        room = (2 * prompt + 10).clamp(max=model.max_positions) - given
        more = (torch.rand(room.shape, device=room.device) * (room.clamp(min=0) + 1)).long()
    else:
        more = -(prompt + given) % model.block_length
    end = prompt + given + more
    position = torch.arange(int(end.max()), device=prompt.device)
    source = batch.source.gather(1, position.clamp(max=batch.source.shape[1] - 1).expand(len(prompt), -1))
    target = batch.target.gather(1, (position - prompt + 1).clamp(0, batch.target.shape[1] - 1))
    tokens = torch.where(position < prompt, source, torch.where(position < prompt + given, target, model.eos_id))
    maskable = (position >= prompt) & (position < end)
    if model.block_length is not None:
        first, last = prompt // model.block_length, (end - 1) // model.block_length
        chosen = first + (torch.rand(first.shape, device=first.device) * (last - first + 1)).long()
        end = end.minimum((chosen + 1) * model.block_length)
        maskable &= (position // model.block_length == chosen) & (position < end)
    return PromptedCanvas(tokens.masked_fill(position >= end, model.pad_id), maskable)


def masked_lm_loss(model: MaskedLM, batch: ParallelBatch, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Bound on the negative log-likelihood per token of the response given the prompt, in nats.

    L = E_m[ (n/m) sum_{t in M} -log p(y_t | y_obs) ] / n, with m uniform in 1 … n of the n tokens learned: the
    any-order bound of masked diffusion (arXiv:2502.09992, equation 5, with m/n for its t).
    """
    canvas = prompted_canvas(model, batch)
    masked = mask_uniformly(canvas.tokens, canvas.maskable)
    states = model.fill_states(canvas.tokens.masked_fill(masked, model.mask_id))
    learned = canvas.maskable.sum(1, keepdim=True)
    weights = (learned / masked.sum(1, keepdim=True).clamp(min=1)).expand(masked.shape)
    total = kd_loss(
        model.project(states[masked]), None, canvas.tokens[masked], alpha=0.0, label_smoothing=label_smoothing,
        weights=weights[masked], reduction="sum",
    )  # fmt: skip
    return {"loss": total / learned.sum()}
