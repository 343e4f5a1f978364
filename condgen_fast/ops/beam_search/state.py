"""What a beam search knows from step to step: tensors that stay where they are, which `beam_update` changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from condgen_fast.ops.beam_search import reference
from condgen_fast.ops.beam_search.reference import Adjustments, Allowed

_STOPPING = ("exact", "heuristic", "first", "topped")


class Candidates(NamedTuple):
    """Continuations of each of R * G groups of beams, best first; a rank of -inf is none."""

    ranks: Tensor  # [R * G, C] float32, what they are ordered by
    sums: Tensor  # [R * G, C] float32, of log-probabilities
    parents: Tensor  # [R * G, C] int64, among all beams of the sentence
    tokens: Tensor  # [R * G, C] int64


@dataclass(frozen=True)
class BeamRules:
    """Who finishes, and when a group of beams is finished.

    stopping      exact      no continuation of a kept hypothesis can still enter the n_best
                  heuristic  the finished list holds `wanted`, and the best kept hypothesis, scored as if it ended now,
                             is no better than the last of these
                  first      the finished list holds `wanted`
                  topped     it holds n_best, and once the best continuation of all was an end
    wanted        hypotheses of a group that `heuristic` and `first` wait for
    n_best        hypotheses of a group that are returned
    rising        the norm does not fall with the length
    cut_at_limit  what reaches the limit is finished as it is; otherwise only an end may follow there
    overflow      of several that end at once, those that the finished list has no room for: best keeps the best of
                  all; order those that come first; room has room for all
    by_rank       hypotheses are compared by their ranks, not by their sums
    no_repeat_ngram  n > 0: no n tokens follow each other twice
    """

    stopping: str
    wanted: int
    n_best: int
    min_length: int = 0
    rising: bool = True
    cut_at_limit: bool = False
    overflow: str = "best"
    by_rank: bool = False
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class BeamConstraints:
    """What tokens may follow, for every sentence and step.

    allowed holds the ends [E], then each sentence's prefix [B, longest_prefix], then the children of the trie's nodes.
    trie: for N nodes and F edges, where the children of each node begin and those of the last end [N + 1] in that last
    part, how many of them, which come first, are ends [N], node * stride + token of each edge, ascending [F], and where
    it leads to [F]; node -1 is where everything is allowed.
    """

    ends: Tensor  # [E] int64, ids that end a hypothesis
    banned: Tensor  # [N] int64; the first `always_banned` at every step, the others before min_length
    always_banned: int
    allowed: Tensor  # int64
    prefix_lengths: Tensor  # [B] int64; [0]: there are no prefixes
    longest_prefix: int = 0
    trie: Tensor | None = None  # [2 * (N + F) + 1] int64
    trie_nodes: int = 0
    trie_stride: int = 0


@dataclass
class BeamState:
    """R sentences of the B that a search began with, K beams of each in G groups, T steps at most."""

    rules: BeamRules
    constraints: BeamConstraints
    norms: Tensor  # [T + 2] float32, what a hypothesis of that length is divided by
    # of the sentences that are left
    sentences: Tensor  # [3, R] int64: place among the B, limit, steps made
    chosen: Tensor  # [2, R, K] int64: tokens, parents
    totals: Tensor  # [1, R, K] or [2, R, K] float32: sums; ranks, where they are something else
    flags: Tensor  # [2, R, G] bool: finished; the best continuation of all was once an end
    bans: Tensor  # [R, K or 1, M] int64, what must not follow; -1 is none
    ranges: Tensor  # [2, R, K] int64: first and behind the last in constraints.allowed; [2, R, 0] if none is restricted
    history: Tensor  # [2, R, K, W] int64: tokens, those of the first step behind W - T others; room. W = 0: not needed
    nodes: Tensor  # [2, R, K] int64: of the trie; room. [2, R, 0] without one
    # of all sentences
    progress: Tensor  # [B + 1] int64: steps of each until it was finished; how many are finished
    finished_ids: Tensor  # [3, B, G, H] int64: parents, tokens, lengths; tokens of -1 are none
    finished_totals: Tensor  # [2, B, G, H] float32: scores, best first; sums
    lattice_ids: Tensor  # [2, T, B, K] int64: tokens, parents of each step
    lattice_totals: Tensor  # [1, T, B, K] or [2, T, B, K] float32: sums; ranks
    # the same, as a search reads it
    tokens: Tensor = field(init=False)  # [R, K]
    parents: Tensor = field(init=False)  # [R, K]
    sums: Tensor = field(init=False)  # [R, K]
    ranks: Tensor = field(init=False)  # [R, K]
    adjust: Adjustments | None = field(init=False)
    allowed: Allowed | None = field(init=False)
    finished_count: Tensor = field(init=False)  # []
    # and as the kernels get it: what they change, what they only read, numbers
    changed: list[Tensor] = field(init=False, repr=False)
    constant: list[Tensor] = field(init=False, repr=False)
    numbers: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tokens, self.parents = self.chosen.unbind()
        self.sums, self.ranks = self.totals[0], self.totals[-1]
        self.adjust = self.allowed = None
        if self.bans.shape[2] > 0:
            amounts = torch.full_like(self.bans, -torch.inf, dtype=torch.float32)
            self.adjust = Adjustments(*(each.expand(*self.tokens.shape, -1) for each in (self.bans, amounts)))
        if self.ranges.shape[2] > 0:
            self.allowed = Allowed(self.constraints.allowed, *self.ranges.unbind())
        self.finished_count = self.progress[-1]
        rules, c = self.rules, self.constraints
        self.changed = [
            self.sentences, self.chosen, self.totals, self.flags, self.progress,
            self.finished_ids, self.finished_totals, self.lattice_ids, self.lattice_totals,
            self.bans, self.ranges, self.history, self.nodes,
        ]  # fmt: skip
        self.constant = [c.ends, self.norms, c.banned, c.prefix_lengths, c.ends[:0] if c.trie is None else c.trie]
        self.numbers = [
            _STOPPING.index(rules.stopping), rules.wanted, rules.n_best, rules.min_length,
            rules.rising, rules.cut_at_limit, rules.overflow == "order", rules.by_rank,
            rules.no_repeat_ngram, c.always_banned, c.longest_prefix, c.trie_nodes, c.trie_stride,
        ]  # fmt: skip

    @property
    def groups(self) -> int:
        return self.flags.shape[2]

    @property
    def steps(self) -> int:
        """The most there can be, T."""
        return self.lattice_ids.shape[1]

    @classmethod
    def start(
        cls,
        rules: BeamRules,
        constraints: BeamConstraints,
        limits: Tensor,  # [B] int64
        norms: Tensor,  # [T + 2] float32
        *,
        beams: int,
        groups: int = 1,
        ranked: bool = False,
        first_token: int,
        history: int | None = None,
    ) -> BeamState:
        """Before the first step: one hypothesis in each group, of no tokens.

        limits   tokens of each sentence's longest hypothesis, at most T
        ranked   ranks are not sums
        history  how many tokens (of first_token) a hypothesis begins with, where what it has is to be known
        """
        device = limits.device
        integers, floats = dict(dtype=torch.int64, device=device), dict(dtype=torch.float32, device=device)
        B, K, G, T = limits.shape[0], beams, groups, norms.shape[0] - 2
        H = rules.wanted + (K // G - 1 if rules.overflow == "room" else 0)
        if rules.no_repeat_ngram and history is None:
            history = 0
        W = 0 if history is None else T + history
        windows = max(W - rules.no_repeat_ngram + 1, 0) if rules.no_repeat_ngram else 0
        restricts = not rules.cut_at_limit or constraints.longest_prefix > 0 or constraints.trie is not None
        totals = torch.full((1 + ranked, B, G, K // G), -torch.inf, **floats)
        totals[..., 0] = 0.0
        finished_ids = torch.zeros(3, B, G, H, **integers)
        finished_ids[1], finished_ids[2] = -1, 1
        state = cls(
            rules,
            constraints,
            norms,
            sentences=torch.stack([torch.arange(B, device=device), limits, torch.zeros_like(limits)]),
            chosen=torch.full((2, B, K), first_token, **integers),
            totals=totals.flatten(2),
            flags=torch.zeros(2, B, G, dtype=torch.bool, device=device),
            bans=torch.empty(B, K if windows else 1, constraints.banned.shape[0] + windows, **integers),
            ranges=torch.empty(2, B, K if restricts else 0, **integers),
            history=torch.full((2, B, K, W), first_token, **integers),
            nodes=torch.zeros(2, B, K if constraints.trie is not None else 0, **integers),
            progress=torch.zeros(B + 1, **integers),
            finished_ids=finished_ids,
            finished_totals=torch.full((2, B, G, H), -torch.inf, **floats),
            lattice_ids=torch.empty(2, T, B, K, **integers),
            lattice_totals=torch.empty(1 + ranked, T, B, K, **floats),
        )
        reference.write_lists(state)
        return state

    def select(self, rows: Tensor) -> BeamState:
        """The state of these rows [R'] of the R, in that order, in tensors of its own but for what is of all B."""
        of_rows = ("sentences", "chosen", "totals", "flags", "ranges", "history", "nodes")
        parts = {name: getattr(self, name).index_select(1, rows) for name in of_rows}
        return replace(self, bans=self.bans.index_select(0, rows), **parts)

    def unfinished(self, count: int) -> Tensor:
        """The rows [count] that are not finished, in order; where these are fewer, followed by others."""
        return self.flags[0].all(1).long().sort(stable=True).indices[:count]

    def generated(self) -> Tensor:
        """The tokens [R, K, W] that hypotheses have, at least one; the last is repeated up to W."""
        W = self.history.shape[3]
        count = W - self.steps + self.sentences[2]
        index = torch.minimum(torch.arange(W, device=count.device), count[:, None] - 1)
        return self.history[0].gather(2, index[:, None].expand(self.history.shape[1:]))
