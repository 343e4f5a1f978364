"""Which continuations of a step's hypotheses a beam search chooses from: the best, or drawn ones."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast.decode.constraints import joined
from condgen_fast.decode.left_to_right import log_sum
from condgen_fast.decode.sampling import mixed, uniform
from condgen_fast.ops.beam_search import Adjustments, Allowed, Candidates, unchecked_beam_topk


def best(
    logits: Tensor,
    sums: Tensor,
    ranks: Tensor,
    count: int,
    adjust: Adjustments | None,
    allowed: Allowed | None,
    impl: str,
) -> Candidates:
    """The `count` best; where ranks are not sums, adjustments other than bans are still in the sums returned."""
    found = unchecked_beam_topk(logits, ranks, count, 1.0, adjust, allowed, impl)
    if ranks is sums:
        return Candidates(found.scores, *found)
    behind = (sums - ranks).gather(1, found.parents)
    behind = torch.where(found.scores > -torch.inf, behind, 0.0)
    return Candidates(found.scores, found.scores + behind, found.parents, found.tokens)


def of_groups(
    logits: Tensor,
    sums: Tensor,
    ranks: Tensor,
    groups: int,
    diversity: float,
    count: int,
    adjust: Adjustments | None,
    allowed: Allowed | None,
    impl: str,
) -> Candidates:
    """The `count` best of each group, of tokens that earlier groups chose less `diversity` for each time in the rank
    (Vijayakumar et al. 2016)."""
    R, K, _ = logits.shape
    k = K // groups
    parts, chosen = [], None
    for g in range(groups):
        beams = slice(g * k, (g + 1) * k)
        own = None if adjust is None else Adjustments(*(part[:, beams] for part in adjust))
        limited = allowed and Allowed(allowed.tokens, *(part[:, beams].contiguous() for part in allowed[1:]))
        if chosen is not None:
            shape = (R, k, chosen.shape[1])
            amounts = torch.full((1, 1, 1), -diversity, device=logits.device).expand(shape)
            own = joined(own, Adjustments(chosen[:, None].expand(shape), amounts))
        found = best(logits[:, beams], sums[:, beams], ranks[:, beams], count, own, limited, impl)
        if chosen is not None:
            same = (found.tokens[:, :, None] == chosen[:, None]).sum(2)
            found = found._replace(sums=found.sums + diversity * same)
        kept = found.tokens[:, :k].masked_fill(found.ranks[:, :k] == -torch.inf, -1)
        chosen = kept if chosen is None else torch.cat([chosen, kept], 1)
        parts.append(found._replace(parents=found.parents + g * k))
    return Candidates(*(torch.stack(column, 1).flatten(0, 1) for column in zip(*parts, strict=True)))


def sampled(
    logits: Tensor,
    sums: Tensor,
    noise: Tensor,
    count: int,
    temperature: float,
    adjust: Adjustments | None,
    allowed: Allowed | None,
) -> Candidates:
    """`count` continuations drawn without replacement from softmax(totals / temperature), in the order of totals:
    those of the highest totals / temperature + Gumbel noise."""
    totals = _totals(logits, sums, adjust, allowed)
    index = (totals / temperature + noise).flatten(1).topk(count).indices
    totals, order = totals.flatten(1).gather(1, index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    V = logits.shape[2]
    return Candidates(totals, totals, index // V, index % V)


def without_replacement(
    logits: Tensor,
    sums: Tensor,
    ranks: Tensor,
    noise: Tensor,
    count: int,
    adjust: Adjustments | None,
    allowed: Allowed | None,
) -> Candidates:
    """The `count` highest perturbed totals, the highest of a hypothesis's children being its own (Kool et al. 2019,
    algorithm 1, in the numerically stable form of their appendix B.3)."""
    totals = _totals(logits, sums, adjust, allowed)
    perturbed = totals + noise
    highest = perturbed.amax(2, keepdim=True)
    v = ranks[..., None] - perturbed + torch.log1p(-(perturbed - highest).exp())
    perturbed = ranks[..., None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    perturbed = torch.where(totals > -torch.inf, perturbed, -torch.inf)
    ranks, index = perturbed.flatten(1).topk(count)
    V = logits.shape[2]
    return Candidates(ranks, totals.flatten(1).gather(1, index), index // V, index % V)


class StochasticBeams:
    """Noise that depends on the seed, the sentence, the step, the beam and the token, not on the batch."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys  # [B, K] int64

    def start(self, sums: Tensor) -> Tensor:
        """The perturbed log-probability of the empty hypothesis: Gumbel noise."""
        return sums + gumbel(mixed(self.keys - 1))

    def noise(self, rows: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
        """[R, K, V] of sentences `rows` [R] that have made `steps` [R]."""
        keys = mixed(self.keys[rows] + steps[:, None])
        return gumbel(mixed(keys[..., None] + torch.arange(vocab_size, device=keys.device)))


def gumbel(keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32."""
    exponential = -torch.log1p(-uniform(keys))  # positive unless the draw is 0
    return -exponential.clamp(min=2.0**-60).log().float()


def _totals(logits: Tensor, sums: Tensor, adjust: Adjustments | None, allowed: Allowed | None) -> Tensor:
    logits = torch.where(logits.isnan(), -torch.inf, logits.float())
    totals = sums[..., None] + (logits - log_sum(logits)[..., None]).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    R, K, V = totals.shape
    if adjust is not None:
        known = (adjust.tokens >= 0) & (adjust.tokens < V)
        totals = totals.scatter_add(2, adjust.tokens.where(known, 0), adjust.amounts.where(known, 0.0))
    if allowed is not None:
        # where allowed.first <= place of a token in the list < allowed.last
        places = torch.arange(allowed.tokens.shape[0], device=totals.device)
        known = (allowed.tokens >= 0) & (allowed.tokens < V)
        inside = known & (places >= allowed.first[..., None]) & (places < allowed.last[..., None])  # [R, K, E]
        index = allowed.tokens.where(known, 0).expand(R, K, -1)
        mask = torch.zeros(R, K, V, dtype=torch.int32, device=totals.device)
        mask = mask.scatter_add(2, index, inside.int()) > 0
        totals = torch.where(mask | (allowed.first < 0)[..., None], totals, -torch.inf)
    return totals
