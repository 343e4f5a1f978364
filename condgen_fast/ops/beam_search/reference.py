"""The steps of a beam search in plain PyTorch: the specification of what the kernels compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from condgen_fast.ops.beam_search.state import BeamState, Candidates


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
        adjusted = totals.scatter_add(2, adjust.tokens.where(known, 0), adjust.amounts.where(known, 0.0))
        totals = torch.where(totals == -torch.inf, -torch.inf, adjusted)
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
    mask[allowed.first < 0] = True
    for b, i in (allowed.first >= 0).nonzero().tolist():
        tokens = allowed.tokens[allowed.first[b, i] : allowed.last[b, i]]
        mask[b, i, tokens[(tokens >= 0) & (tokens < V)]] = True
    return mask


_DTYPES = (torch.float32, torch.int64, torch.int64)


def _padded(scores: Tensor, parents: Tensor, tokens: Tensor, k: int) -> BeamTopK:
    unused = (0, k - scores.shape[1])
    pad = torch.nn.functional.pad
    return BeamTopK(pad(scores, unused, value=-torch.inf), pad(parents, unused), pad(tokens, unused))


def beam_update(state: BeamState, found: Candidates) -> None:
    rules, G = state.rules, state.groups
    (R, K), C = state.tokens.shape, found.tokens.shape[1]
    k = K // G
    places, limits, steps = state.sentences
    if state.tokens.device.type == "cpu":  # as the compiled op does; on a GPU it takes the nearest
        check_range(found.parents, "parents", 0, K)
    length, limit = (steps + 1).repeat_interleave(G), limits.repeat_interleave(G)  # [R * G]
    done, topped = state.flags.flatten(1)
    values = found.ranks if rules.by_rank else found.sums
    alive, is_end = found.ranks > -torch.inf, torch.isin(found.tokens, state.constraints.ends)

    ending = is_end | (length == limit)[:, None] if rules.cut_at_limit else is_end
    ending = ending & alive & ~done[:, None] & (torch.arange(C, device=done.device) < k)
    ids, (scores, sums) = (part[:, places].flatten(1, 2) for part in (state.finished_ids, state.finished_totals))
    if rules.overflow == "order":
        room = (scores == -torch.inf).sum(1, keepdim=True)
        ending = ending & (ending.cumsum(1) <= room)
    topped |= ending[:, 0]
    new = torch.where(ending, values / state.norms[length][:, None], -torch.inf)
    scores, order = torch.cat([scores, new], 1).sort(dim=1, descending=True, stable=True)
    H = sums.shape[1]
    scores, order = scores[:, :H], order[:, :H]
    sums = torch.cat([sums, found.sums], 1).gather(1, order)
    new_ids = torch.stack([found.parents, found.tokens, length[:, None].expand(-1, C)])
    ids = torch.cat([ids, new_ids], 2).gather(2, order.expand(3, -1, -1))
    state.finished_totals[:, places] = torch.stack([scores, sums]).view(2, R, G, H)
    state.finished_ids[:, places] = ids.view(3, R, G, H)

    kept, dead = _first(alive & ~is_end, k)
    state.tokens.copy_(found.tokens.gather(1, kept).view(R, K))
    state.parents.copy_(found.parents.gather(1, kept).view(R, K))
    state.sums.copy_(found.sums.gather(1, kept).masked_fill(dead, -torch.inf).view(R, K))
    state.ranks.copy_(found.ranks.gather(1, kept).masked_fill(dead, -torch.inf).view(R, K))
    state.lattice_ids[:, steps, places] = state.chosen
    state.lattice_totals[:, steps, places] = state.totals

    before = done.view(R, G).all(1)
    best = (state.ranks if rules.by_rank else state.sums).view(R * G, k).amax(1)
    done |= _is_over(state, scores, best, topped, length, limit)
    state.progress[places] += (~before).long()
    state.finished_count += (done.view(R, G).all(1) & ~before).sum()

    W = state.history.shape[3]
    if W > 0:
        moved = state.history[0].gather(1, state.parents[:, :, None].expand(-1, -1, W))
        count = (W - state.steps + steps)[:, None, None].expand(-1, K, 1)
        state.history[0] = moved.scatter(2, count, state.tokens[:, :, None])
    if state.nodes.shape[2] > 0:
        nodes = state.nodes[0].gather(1, state.parents)
        state.nodes[0] = torch.where(_is_forced(state)[:, None], nodes, _follow(state, nodes))
    steps += 1
    write_lists(state)


def check_range(values: Tensor, name: str, least: int, end: int) -> None:
    if values.numel() > 0:
        low, high = (int(value) for value in torch.aminmax(values))
        if low < least or high >= end:
            raise ValueError(f"{name} must be in [{least}, {end}); got {low if low < least else high}")


def _first(wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the first k true of `wanted` [R, C], and where there are fewer, which then are others: [R, k] each."""
    columns = torch.arange(wanted.shape[1], device=wanted.device)
    order = torch.where(wanted, columns, columns + wanted.shape[1])
    order = order.topk(k, largest=False, sorted=True).values
    return order % wanted.shape[1], order >= wanted.shape[1]


def _is_over(state: BeamState, scores: Tensor, best: Tensor, topped: Tensor, length: Tensor, limit: Tensor) -> Tensor:
    """Groups [R * G] that are finished after `length` tokens, `scores` [R * G, H] being those of their finished
    hypotheses, best first, and `best` that of what they kept."""
    rules = state.rules
    last, nth = scores[:, rules.wanted - 1], scores[:, rules.n_best - 1]
    over = limit <= length
    if rules.stopping == "topped":
        return over | (topped & (nth > -torch.inf))
    over = over | (best == -torch.inf)
    if rules.stopping == "first":
        return over | (last > -torch.inf)
    if rules.stopping == "heuristic":
        return over | ((last > -torch.inf) & (last >= best / state.norms[length]))
    # Admissible: log-probabilities are at most 0, so what follows a kept hypothesis of sum c has a sum c' <= c <=
    # best <= 0, and ends at a length l with length < l <= limit and l >= min_length. norm is positive, so it scores
    # c' / norm(l) <= best / norm(l); and as best <= 0, that is greatest where norm(l) is. norm is l**a,
    # ((5+l)/6)**a or 1, monotone in l, rising for a >= 0 and falling for a < 0: greatest at the last or the first
    # of these l. Nothing above best / norm(that l) can follow, so the n_best stand once their last is not below it.
    # Perturbed sums (stochastic beams) may be positive, but are not divided, and no continuation has a higher one.
    at = limit if rules.rising else torch.minimum(limit, (length + 1).clamp(min=rules.min_length))
    return over | (nth >= best / state.norms[at])


def _is_forced(state: BeamState) -> Tensor:
    """Rows [R] whose next token is in their prefix."""
    places, _, steps = state.sentences
    if state.constraints.longest_prefix == 0:
        return torch.zeros_like(steps, dtype=torch.bool)
    return state.constraints.prefix_lengths[places] > steps


def _follow(state: BeamState, nodes: Tensor) -> Tensor:
    """Where the newest tokens lead to; they are children of their nodes, or the hypothesis is dead."""
    c = state.constraints
    edges = (c.trie.shape[0] - 1) // 2 - c.trie_nodes
    keys, targets = c.trie[2 * c.trie_nodes + 1 :].split(edges)
    wanted = nodes.clamp(min=0) * c.trie_stride + state.tokens.clamp(max=c.trie_stride - 1)
    place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=edges - 1)
    return torch.where(nodes < 0, nodes, targets[place])


def write_lists(state: BeamState) -> None:
    """What may follow at the next step: state.bans and state.ranges."""
    rules, c = state.rules, state.constraints
    places, limits, steps = state.sentences
    forced, at_limit = _is_forced(state)[:, None], (limits == steps + 1)[:, None]  # [R, 1]
    early = (steps[:, None] + 1 < rules.min_length) & ~at_limit
    always = torch.arange(c.banned.shape[0], device=steps.device) < c.always_banned
    bans = torch.where(always | early, c.banned, -1)[:, None].expand(-1, state.bans.shape[1], -1)
    if state.bans.shape[2] > bans.shape[2]:
        bans = torch.cat([bans, _repeating(state)], 2)
    state.bans.copy_(bans.masked_fill(forced[..., None], -1))
    if state.ranges.shape[2] == 0:
        return

    none = torch.full_like(state.tokens, -1)
    nodes = none if c.trie is None else state.nodes[0]
    only_ends = at_limit & (nodes < 0) & (not rules.cut_at_limit)
    first, last = torch.where(only_ends, 0, none), torch.where(only_ends, c.ends.shape[0], none)
    if c.trie is not None:
        edges = (c.trie.shape[0] - 1) // 2 - c.trie_nodes
        children, inside = c.allowed.shape[0] - edges, nodes.clamp(min=0)
        begin = children + c.trie[inside]
        ends_only = begin + c.trie[c.trie_nodes + 1 + inside]  # they come first
        behind = torch.where(at_limit & (not rules.cut_at_limit), ends_only, children + c.trie[inside + 1])
        first, last = torch.where(nodes < 0, first, begin), torch.where(nodes < 0, last, behind)
    if c.longest_prefix > 0:
        place = (c.ends.shape[0] + places * c.longest_prefix + steps)[:, None]
        first, last = torch.where(forced, place, first), torch.where(forced, place + 1, last)
    state.ranges[0], state.ranges[1] = first, last


def _repeating(state: BeamState) -> Tensor:
    """Tokens [R, K, W - n + 1] that would repeat n tokens; -1 stands for none."""
    n, (_, _, _, W) = state.rules.no_repeat_ngram, state.history.shape
    count = (W - state.steps + state.sentences[2])[:, None, None]  # [R, 1, 1]
    newest = (count - n + 1 + torch.arange(n - 1, device=count.device)).clamp(min=0)
    newest = state.history[0].gather(2, newest.expand(-1, state.history.shape[2], -1))
    windows = state.history[0].unfold(2, n, 1)
    whole = torch.arange(W - n + 1, device=count.device) + n <= count
    return torch.where((windows[..., :-1] == newest[:, :, None]).all(-1) & whole, windows[..., -1], -1)


def beam_hypotheses(
    finished: Tensor,  # [3, B, n]
    sums: Tensor,  # [B, n]
    tokens: Tensor,  # [T, B, K]
    parents: Tensor,  # [T, B, K]
    totals: Tensor,  # [T, B, K]
    ends: Tensor,  # [E]
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    T, (slots, last, lengths) = tokens.shape[0], finished
    ended = torch.isin(last, ends) | (last < 0)
    places = lengths - 1
    on_cpu, beams = tokens.device.type == "cpu", tokens.shape[2]
    if on_cpu:
        check_range(lengths, "lengths of finished", 1, T + 1)
        check_range(slots, "beams of finished", 0, beams)
    found = torch.full((T, *lengths.shape), pad_id, dtype=torch.int64, device=tokens.device)
    log_probs = torch.zeros(T + 1, *lengths.shape, device=tokens.device)
    after = sums
    for step in reversed(range(T)):
        inside, here = step < places, step == places
        found[step] = torch.where(inside, tokens[step].gather(1, slots), found[step])
        found[step] = torch.where(here & ~ended, last, found[step])
        total = totals[step].gather(1, slots)
        log_probs[step + 1] = torch.where(inside, after - total, 0.0)
        after = torch.where(inside, total, after)
        slots = torch.where(inside, parents[step].gather(1, slots), slots)
        if on_cpu:
            check_range(slots, "parents", 0, beams)
    log_probs[0] = after
    return found.permute(1, 2, 0).contiguous(), lengths - ended.long(), log_probs.permute(1, 2, 0).contiguous()
