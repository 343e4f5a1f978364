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


class Adjustments(NamedTuple):
    """What is added to the totals of a few tokens of each beam; several of one token add up.

    amounts are finite, or -inf, which bans the token. An id outside the vocabulary (-1, say) stands for none.
    """

    tokens: Tensor  # [B, K, M] int64
    amounts: Tensor  # [B, K, M] float32


class Allowed(NamedTuple):
    """Beam i of sentence b is restricted to tokens[first[b, i] : last[b, i]], unless first[b, i] is negative.

    No token may stand twice in a beam's list. An id outside the vocabulary stands for none.
    """

    tokens: Tensor  # [E] int64, the lists of all beams; they may overlap
    first: Tensor  # [B, K] int64
    last: Tensor  # [B, K] int64


def beam_topk(
    logits: Tensor,  # [B, K, V]
    scores: Tensor,  # [B, K]
    k: int,
    *,
    temperature: float = 1.0,
    adjust: Adjustments | None = None,
    allowed: Allowed | None = None,
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
    if adjust is not None:
        known = (adjust.tokens >= 0) & (adjust.tokens < V)
        totals = totals.scatter_add(2, adjust.tokens.where(known, 0), adjust.amounts.where(known, 0.0))
    if allowed is not None:
        totals = torch.where(_mask(allowed, B, K, V), totals, -torch.inf)
    totals = torch.where(alive[..., None], totals, -torch.inf)

    # stable sorts, the least important key first
    by_logit = logits.sort(dim=-1, descending=True, stable=True).indices  # [B, K, V] tokens
    totals = totals.gather(-1, by_logit).flatten(1)
    order = totals.sort(dim=1, descending=True, stable=True).indices[:, :found]
    totals, tokens, parents = totals.gather(1, order), by_logit.flatten(1).gather(1, order), order // V
    real = totals > -torch.inf
    return _padded(totals, parents.where(real, 0), tokens.where(real, 0), k)


def _mask(allowed: Allowed, B: int, K: int, V: int) -> Tensor:
    mask = torch.zeros(B, K, V, dtype=torch.bool, device=allowed.tokens.device)
    for b in range(B):
        for i in range(K):
            if allowed.first[b, i] < 0:
                mask[b, i] = True
                continue
            tokens = allowed.tokens[allowed.first[b, i] : allowed.last[b, i]]
            mask[b, i, tokens[(tokens >= 0) & (tokens < V)]] = True
    return mask


_DTYPES = (torch.float32, torch.int64, torch.int64)


def _padded(scores: Tensor, parents: Tensor, tokens: Tensor, k: int) -> BeamTopK:
    unused = (0, k - scores.shape[1])
    pad = torch.nn.functional.pad
    return BeamTopK(pad(scores, unused, value=-torch.inf), pad(parents, unused), pad(tokens, unused))
