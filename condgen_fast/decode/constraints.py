"""What a left-to-right hypothesis may be continued with: bans, forced prefixes, tries, penalties."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.left_to_right import log_sum
from condgen_fast.decode.trie import Trie
from condgen_fast.ops.beam_search import Adjustments, BeamConstraints


def constraints_of(
    *,
    ends: list[int],
    banned: list[int],
    early: bool,
    prefixes: Prefixes | None,
    trie: Trie | None,
    device: torch.device,
) -> BeamConstraints:
    """ends    ids that end a hypothesis
    banned  ids that are never generated
    early   the ends are banned at first
    """
    early_bans = [end for end in ends if end not in banned] if early else []
    ends_on_device = torch.tensor(ends, dtype=torch.int64, device=device)
    # the lists that beams are restricted to: the ends, each sentence's prefix, the children of the trie's nodes
    parts, of_trie = [ends_on_device], {}
    if prefixes is not None:
        parts.append(prefixes.tokens.reshape(-1))
    if trie is not None:
        children, edges, nodes, stride = trie.laid_out(ends)
        parts.append(children.to(device))
        of_trie = dict(trie=edges.to(device), trie_nodes=nodes, trie_stride=stride)
    return BeamConstraints(
        ends=ends_on_device,
        banned=torch.tensor(banned + early_bans, dtype=torch.int64, device=device),
        always_banned=len(banned),
        allowed=torch.cat(parts),
        prefix_lengths=ends_on_device[:0] if prefixes is None else prefixes.lengths,
        longest_prefix=0 if prefixes is None else prefixes.tokens.shape[1],
        **of_trie,
    )


def penalised(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """`logits` [R, K, V] with those of the tokens in `history` [R, K, t] divided by `penalty` where positive and
    multiplied where negative (Keskar et al. 2019, arXiv:1909.05858)."""
    seen = logits.gather(2, history)
    return logits.scatter(2, history, torch.where(seen > 0, seen / penalty, seen * penalty))


def penalties(logits: Tensor, history: Tensor, penalty: float) -> Adjustments:
    """The same of log-probabilities, which stay without a normaliser: what Hugging Face's beams do."""
    tokens = history.sort(2).values
    repeated = torch.nn.functional.pad(tokens.diff(dim=2) == 0, (1, 0))
    log_probs = logits.gather(2, tokens).float() - log_sum(logits)[..., None]
    amounts = torch.where(log_probs.isfinite(), log_probs * (penalty - 1), -torch.inf)  # of others it cannot follow
    return Adjustments(tokens.masked_fill(repeated, -1), amounts)


def without(logits: Tensor, banned: Adjustments) -> Tensor:
    """Logits [R, K, V] of -inf for what is banned, which has no share of the probability then."""
    tokens = banned.tokens.where(banned.tokens >= 0, 0)
    amounts = torch.where(banned.tokens >= 0, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(2, tokens, amounts, "amin")


def joined(one: Adjustments | None, other: Adjustments | None) -> Adjustments | None:
    if one is None or other is None:
        return one if other is None else other
    return Adjustments(*(torch.cat(pair, 2) for pair in zip(one, other, strict=True)))


def check_lists(value: Any, name: str) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list; got {type(value).__name__}")


def check_ids(value: Any, name: str) -> None:
    """A list, or a set, of ids."""
    if not isinstance(value, Set):
        check_lists(value, name)
    for token in value:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"{name} must hold ints only; got {token!r}")


def room_for(prefix: Sequence[int], ends: list[int], behind: int) -> int:
    """Tokens of the shortest hypothesis that begins with `prefix`: up to an end in it, or `behind` more."""
    first_end = next((i for i, token in enumerate(prefix) if token in ends), len(prefix))
    return min(first_end + 1, len(prefix) + behind)


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
