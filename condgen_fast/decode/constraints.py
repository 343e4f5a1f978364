"""What a left-to-right hypothesis may be continued with: bans, forced prefixes, tries, as lists for `beam_topk`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen_fast.decode.left_to_right import log_sum
from condgen_fast.decode.trie import Trie
from condgen_fast.ops.beam_search import Adjustments, Allowed


class Constraints:
    """The rules of one search; `lists` gives those of a step, on the device and without asking it anything.

    ends           ids that end a hypothesis
    banned         ids that are never generated
    prefix_tokens  [B, P] and prefix_lengths [B]: what each target begins with
    """

    def __init__(
        self,
        *,
        ends: list[int],
        banned: list[int],
        min_length: int,
        no_repeat_ngram: int,
        prefix_tokens: Tensor | None,
        prefix_lengths: Tensor | None,
        trie: Trie | None,
        only_ends_at_limit: bool,
        device: torch.device,
    ) -> None:
        self.banned = torch.tensor(banned, dtype=torch.int64, device=device)
        self.early = torch.tensor(banned + [e for e in ends if e not in banned], dtype=torch.int64, device=device)
        self._ban = torch.full((16,), -torch.inf, device=device)
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.min_length, self.no_repeat_ngram = min_length, no_repeat_ngram
        self.prefix_lengths = prefix_lengths
        self.longest_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
        self.trie = trie.to(device, self.ends) if trie is not None else None
        self.only_ends_at_limit = only_ends_at_limit
        # the lists that beams are restricted to: the ends, each sentence's prefix, the children of the trie's nodes
        parts = [self.ends]
        if prefix_tokens is not None:
            parts.append(prefix_tokens.reshape(-1))
        if self.trie is not None:
            parts.append(self.trie.tokens)
        self.allowed = torch.cat(parts)

    def lists(
        self, step: int, rows: Tensor, history: Tensor | None, nodes: Tensor | None, at_limit: Tensor | None, beams: int
    ) -> tuple[Adjustments | None, Allowed | None, Tensor | None]:
        """Changed totals and lists of allowed tokens, and where [R] a prefix is forced.

        rows [R] are the sentences, history [R, K, t] what has been generated, nodes [R, K] where in the trie it ends,
        at_limit [R] whether the hypotheses have reached their limit (None: none has).
        """
        forced = None
        if step < self.longest_prefix:
            forced = self.prefix_lengths[rows] > step
        shape = (rows.shape[0], beams)
        static = self.early if step + 1 < self.min_length else self.banned
        bans = [static.expand(*shape, -1)] if static.shape[0] else []
        if at_limit is not None and step + 1 < self.min_length:  # which gives way to the limit
            is_end = (bans[0][..., None] == self.ends).any(-1) & ~(self.banned[:, None] == self.ends).any()
            bans[0] = bans[0].masked_fill(is_end & at_limit[:, None, None], -1)
        if history is not None and self.no_repeat_ngram and history.shape[2] >= self.no_repeat_ngram:
            bans.append(_repeating(history, self.no_repeat_ngram))
        adjust = None
        if bans:
            tokens = bans[0] if len(bans) == 1 else torch.cat(bans, 2)
            if forced is not None:
                tokens = tokens.masked_fill(forced[:, None, None], -1)
            if self._ban.shape[0] < tokens.shape[2]:
                self._ban = torch.full((2 * tokens.shape[2],), -torch.inf, device=rows.device)
            adjust = Adjustments(tokens, self._ban[: tokens.shape[2]].expand(tokens.shape))
        return adjust, self._allowed(step, rows, nodes, at_limit, forced, shape), forced

    def _allowed(
        self,
        step: int,
        rows: Tensor,
        nodes: Tensor | None,
        at_limit: Tensor | None,
        forced: Tensor | None,
        shape: tuple[int, int],
    ) -> Allowed | None:
        only_ends = at_limit is not None and self.only_ends_at_limit
        if nodes is None and forced is None and not only_ends:
            return None
        first = torch.full(shape, -1, dtype=torch.int64, device=rows.device)
        last = first
        if nodes is not None:
            first, last = self.trie.children(nodes)
            base = self.allowed.shape[0] - self.trie.tokens.shape[0]
            free = first < 0
            if only_ends:
                # of the children only the ends, which stand first
                count = self.trie.ends_among_children(nodes)
                last = torch.where(at_limit[:, None], first + count, last)
            first, last = torch.where(free, -1, first + base), torch.where(free, -1, last + base)
            if only_ends:
                unbound = free & at_limit[:, None]
                first = first.masked_fill(unbound, 0)
                last = last.masked_fill(unbound, self.ends.shape[0])
        elif only_ends:
            first = torch.where(at_limit[:, None], 0, first)
            last = torch.where(at_limit[:, None], self.ends.shape[0], last)
        if forced is not None:
            place = (self.ends.shape[0] + rows * self.longest_prefix + step)[:, None]
            first, last = torch.where(forced[:, None], place, first), torch.where(forced[:, None], place + 1, last)
        return Allowed(self.allowed, first.contiguous(), last.contiguous())


def _repeating(history: Tensor, n: int) -> Tensor:
    """Tokens [R, K, t - n + 1] that would repeat n tokens of `history` [R, K, t], t >= n; -1 stands for none."""
    windows = history.unfold(2, n, 1)
    recent = history[:, :, None, history.shape[2] - n + 1 :]
    return torch.where((windows[..., :-1] == recent).all(-1), windows[..., -1], -1)


def penalised(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """`logits` [R, K, V] with those of the tokens in `history` [R, K, t] divided by `penalty` where positive and
    multiplied where negative (Keskar et al. 2019, arXiv:1909.05858)."""
    seen = logits.gather(2, history)
    return logits.scatter(2, history, torch.where(seen > 0, seen / penalty, seen * penalty))


def penalties(logits: Tensor, history: Tensor, penalty: float) -> Adjustments:
    """The same of log-probabilities, which stay without a normaliser: what Hugging Face's beams do."""
    earlier = history[..., None] == history[..., None, :]
    repeated = (earlier & torch.ones_like(earlier).tril(-1)).any(-1)
    log_probs = logits.gather(2, history).float() - log_sum(logits)[..., None]
    return Adjustments(history.masked_fill(repeated, -1), log_probs * (penalty - 1))


def joined(one: Adjustments | None, other: Adjustments | None) -> Adjustments | None:
    if one is None or other is None:
        return one if other is None else other
    return Adjustments(*(torch.cat(pair, 2) for pair in zip(one, other, strict=True)))


@dataclass(frozen=True)
class Prefixes:
    """Forced beginnings of the targets of a batch, checked: tokens [B, P], lengths [B]."""

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], batch: int, vocab_size: int, device: torch.device) -> Prefixes | None:
        if len(lists) != batch:
            raise ValueError(f"prefixes must have one list for each of {batch} sentences; got {len(lists)}")
        longest = max((len(row) for row in lists), default=0)
        if longest == 0:
            return None
        for row in lists:
            if any(not 0 <= token < vocab_size for token in row):
                raise ValueError(f"prefixes must hold ids in [0, {vocab_size}); got {list(row)}")
        rows = [list(row) + [0] * (longest - len(row)) for row in lists]
        lengths = torch.tensor([len(row) for row in lists], dtype=torch.int64, device=device)
        return cls(torch.tensor(rows, dtype=torch.int64, device=device), lengths)
