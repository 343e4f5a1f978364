"""Selection of a beam step in plain PyTorch: the specification of what the kernels compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BeamTopK(NamedTuple):
    """The best continuations of each sentence, best first."""

    scores: Tensor  # [B, k] float32
    parents: Tensor  # [B, k] int64, the beam that is continued
    tokens: Tensor  # [B, k] int64, with what


def beam_topk(
    logits: Tensor,  # [B, K, V]
    scores: Tensor,  # [B, K]
    k: int,
    *,
    temperature: float = 1.0,
) -> BeamTopK:
    B, K, V = logits.shape
    found = min(k, K * V)
    if B == 0 or found == 0:
        return _padded(*(torch.empty(B, 0, dtype=d, device=logits.device) for d in _DTYPES), k)
    limits = torch.finfo(torch.float32)
    temperature = min(max(temperature, limits.tiny), limits.max)

    logits = logits.float()
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    scores = scores.float()
    best = logits.amax(-1)
    alive = scores.isfinite() & best.isfinite()
    below = (logits - best[..., None]) / temperature
    log_sum = below.double().exp().sum(-1).log().float()
    totals = scores[..., None] + (below - log_sum[..., None])
    totals = torch.where(alive[..., None], totals, -torch.inf)
    logits = torch.where(alive[..., None], logits, -torch.inf)

    # stable sorts, the least important key first
    by_logit = logits.sort(dim=-1, descending=True, stable=True).indices  # [B, K, V] tokens
    totals = totals.gather(-1, by_logit).flatten(1)
    order = totals.sort(dim=1, descending=True, stable=True).indices[:, :found]
    return _padded(totals.gather(1, order), order // V, by_logit.flatten(1).gather(1, order), k)


_DTYPES = (torch.float32, torch.int64, torch.int64)


def _padded(scores: Tensor, parents: Tensor, tokens: Tensor, k: int) -> BeamTopK:
    unused = (0, k - scores.shape[1])
    pad = torch.nn.functional.pad
    return BeamTopK(pad(scores, unused, value=-torch.inf), pad(parents, unused), pad(tokens, unused))
