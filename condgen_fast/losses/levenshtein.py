"""The Levenshtein Transformer's training loss: dual-policy imitation of the edit oracle (Gu 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from condgen_fast._check import check_number
from condgen_fast.data.batching import ParallelBatch
from condgen_fast.models.levenshtein import LevenshteinTransformer
from condgen_fast.ops import apply_edits, edit_oracle, kd_loss, random_delete


class Policy(NamedTuple):
    """Roll-in of the dual policy; the probabilities are per sentence.

    `alpha` is the share of deletion canvases that are the initial sequence, not the model's own insertion;
    `beta` the share of insertion canvases that are the oracle's deletion of the initial sequence, not gold with words
    dropped. In training from scratch the initial sequence is empty (bos eos), which has nothing to delete:
    `initial_noise` > 0 makes it gold with that share of its words replaced at random.
    """

    alpha: float = 0.0
    beta: float = 0.0
    full_mask: float = 0.0
    initial_noise: float = 0.0


def levenshtein_loss(
    model: LevenshteinTransformer, batch: ParallelBatch, *, label_smoothing: float = 0.1, policy: Policy | None = None
) -> dict[str, Tensor]:
    """Sum of the placeholder, token and deletion losses, each a mean over its own positions.

    Insertion learns from gold with words dropped (or the oracle's deletion of the initial sequence, `policy.beta`);
    deletion from the model's own insertion on the same canvas (or the initial sequence, `policy.alpha`).
    """
    policy = policy or Policy()
    for name, share in policy._asdict().items():
        check_number(share, name, minimum=0, maximum=1)
    target, ids = batch.target, _ids(model)
    memory = model.encode(batch.source, batch.source_lengths)
    inner = (target != model.pad_id) & (target != model.bos_id) & (target != model.eos_id)
    initial = _initial(model, target, inner, policy.initial_noise)

    canvas = random_delete(target, pad_id=model.pad_id, bos_id=model.bos_id, eos_id=model.eos_id)
    if policy.full_mask > 0:
        empty = apply_edits(target, delete=inner, **ids).tokens
        canvas = torch.where(_rows(target, policy.full_mask), empty, canvas)
    if policy.beta > 0:
        kept = apply_edits(initial, delete=edit_oracle(initial, target, pad_id=model.pad_id).delete, **ids).tokens
        canvas = _choose(_rows(target, policy.beta), kept, canvas, model.pad_id)

    oracle = edit_oracle(canvas, target, pad_id=model.pad_id)
    slots = oracle.insert.clamp(max=model.config.max_insert)
    real_slot = canvas[:, 1:] != model.pad_id
    insert_logits = model.insert_logits(canvas, memory)[real_slot]
    insertion = kd_loss(insert_logits, None, slots[real_slot], alpha=0.0, label_smoothing=0.01)

    masked = oracle.masked
    logits = model.project(model.fill_states(target.masked_fill(masked, model.mask_id), memory)[masked])
    token = kd_loss(logits, None, target[masked], alpha=0.0, label_smoothing=label_smoothing)

    rollin = target.clone()
    choice = logits.detach().clone()  # as in decoding, no special token is written
    choice[:, sorted(set(ids.values()))] = -torch.inf
    rollin[masked] = choice.argmax(-1)
    if policy.alpha > 0:
        rollin = _choose(_rows(target, policy.alpha), initial, rollin, model.pad_id)
    delete = edit_oracle(rollin, target, pad_id=model.pad_id).delete
    deletable = (rollin != model.pad_id) & (rollin != model.bos_id) & (rollin != model.eos_id)
    deletion = kd_loss(model.delete_logits(rollin, memory)[deletable], None, delete[deletable].long(), alpha=0.0)

    return {"loss": insertion + token + deletion, "insertion": insertion, "token": token, "deletion": deletion}


def _ids(model: LevenshteinTransformer) -> dict[str, int]:
    return {"pad_id": model.pad_id, "bos_id": model.bos_id, "eos_id": model.eos_id, "mask_id": model.mask_id}


def _rows(target: Tensor, probability: float) -> Tensor:
    """A coin for every sentence, bool [B, 1]."""
    return torch.rand(target.shape[0], 1, device=target.device) < probability


def _initial(model: LevenshteinTransformer, target: Tensor, inner: Tensor, noise: float) -> Tensor:
    """The initial sequence y0: bos eos, or gold with each word replaced at random with probability `noise`."""
    if noise == 0:
        return apply_edits(target, delete=inner, **_ids(model)).tokens
    words = torch.randint(model.mask_id + 1, model.vocab_size, target.shape, device=target.device)
    replaced = inner & (torch.rand(target.shape, device=target.device) < noise)
    return torch.where(replaced, words, target)


def _choose(first: Tensor, a: Tensor, b: Tensor, pad_id: int) -> Tensor:
    """Rows of a where `first` [B, 1], else of b, padded to the wider of the two."""
    width = max(a.shape[1], b.shape[1])
    a, b = (F.pad(x, (0, width - x.shape[1]), value=pad_id) for x in (a, b))
    return torch.where(first, a, b)
