"""Beam search with selectable length normalisation and stopping, its whole state on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import (
    check_due,
    check_lengths,
    is_any,
    log_prob_of,
    log_sum,
    never_generated,
    take,
    target_limits,
    worth_leaving,
)
from condgen_fast.decode.protocols import StepModel
from condgen_fast.ops.beam_search import BeamTopK, beam_topk


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `beam_size` best unfinished hypotheses of each sentence; return the `n_best` best finished ones.

    beam_size        hypotheses that are extended
    n_best           hypotheses returned, at most beam_size
    length_penalty   score = sum of log-probabilities, eos included / norm(length), the length counting eos
    normalization    norm: power, length ** length_penalty; gnmt, ((5 + length) / 6) ** length_penalty (Wu et al. 2016);
                     none, 1
    stopping         when a sentence is finished:
                     exact      no continuation of a kept hypothesis can still enter the n_best
                     heuristic  the finished list is full, and the best kept hypothesis, scored as if it ended now,
                                is no better than the worst in it (Hugging Face's early_stopping=False)
                     first      the finished list is full (fairseq; Hugging Face's early_stopping=True)
    patience         the finished list holds round(patience * beam_size) hypotheses, at least n_best (Kasai et al.
                     2022); must be 1 with exact stopping, which does not ask how many are finished
    min_length       tokens of the shortest hypothesis, eos included
    max_length       tokens of the longest, eos included; None: 2 * source length + 10, at most `model.max_positions`
    no_repeat_ngram  n > 0: no n tokens follow each other twice in a hypothesis
    impl             implementation of `beam_topk`
    trace            record the best hypothesis's tokens in `Hypotheses.trace`

    A hypothesis finishes when its eos is among the beam_size best allowed continuations of a step; the beam is refilled
    with the best that are not eos, so finished hypotheses take no place in it. At the limit each kept hypothesis ends
    with eos. pad and bos are never generated. Whatever is not allowed keeps its share of the probability: scores are
    sums of the model's own log-probabilities. Ties go to the lower parent, then the lower token, then the hypothesis
    finished earlier.
    """

    beam_size: int = 5
    n_best: int = 1
    length_penalty: float = 1.0
    normalization: str = "power"
    stopping: str = "exact"
    patience: float = 1.0
    min_length: int = 0
    max_length: int | None = None
    no_repeat_ngram: int = 0
    impl: str = "auto"
    trace: bool = False

    model_protocol: ClassVar[type] = StepModel

    def __post_init__(self) -> None:
        check_number(self.beam_size, "beam_size", minimum=1, integer=True)
        check_number(self.n_best, "n_best", minimum=1, integer=True)
        if self.n_best > self.beam_size:
            raise ValueError(f"n_best must be at most beam_size = {self.beam_size}; got {self.n_best}")
        check_choice(self.normalization, "normalization", ("power", "gnmt", "none"))
        check_choice(self.stopping, "stopping", ("exact", "heuristic", "first"))
        check_number(self.patience, "patience", minimum=0.0, exclusive=True)
        if self.stopping == "exact" and self.patience != 1:
            raise ValueError(f"patience must be 1 with exact stopping; got {self.patience}")
        check_number(self.no_repeat_ngram, "no_repeat_ngram", minimum=0, integer=True)
        check_lengths(self.min_length, self.max_length, self.length_penalty)
        check_choice(self.impl, "impl", ("auto", "reference"))

    def run(self, model: StepModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        B, K, device = source.shape[0], self.beam_size, source.device
        limits = target_limits(model, source_lengths, self.max_length, self.min_length)
        limit_steps = set(limits.tolist())
        longest = max(limit_steps)
        norms = self._norms(longest, device)
        never = never_generated(model)

        rows = torch.arange(B, device=device)  # [R] the sentences still in the batch
        places = rows  # [B] where a sentence stands in it
        state = model.start(model.encode(source, source_lengths), K)
        tokens = torch.full((B, K), model.bos_id, dtype=torch.int64, device=device)
        scores = torch.full((B, K), -torch.inf, device=device)
        scores[:, 0] = 0.0
        prefix = tokens[:, :, None][:, :, :0] if self.no_repeat_ngram else None
        done = torch.zeros(B, dtype=torch.bool, device=device)
        iterations = torch.zeros(B, dtype=torch.int64, device=device)
        finished = _Finished.empty(B, self._capacity(), device)
        result = finished
        lattice: list[_Column] = []
        select = getattr(model, "select", None)

        for step in range(longest):
            length = step + 1
            logits, state = model.step(tokens, state)
            at_limit = limits == length if length in limit_steps else None
            banned = never + [model.eos_id] * (length < self.min_length)
            found = self._candidates(logits, scores, prefix, at_limit, len(never), model.eos_id)
            usable = (found.scores > -torch.inf) & ~_barred(found.tokens, banned, model.eos_id, at_limit)
            is_eos = found.tokens == model.eos_id

            within_beam = usable.cumsum(1) <= K
            finished = finished.merged(
                torch.where(usable & is_eos & within_beam & ~done[:, None], found.scores, -torch.inf),
                found.parents,
                length,
                norms[length],
            )
            kept, dead = _first(usable & ~is_eos, K)
            scores = found.scores.gather(1, kept).masked_fill(dead, -torch.inf)
            tokens, parents = found.tokens.gather(1, kept), found.parents.gather(1, kept)
            lattice.append(_Column(scores, parents, tokens, places))
            if prefix is not None:
                prefix = torch.cat([take(prefix, parents), tokens[:, :, None]], 2)

            iterations[rows] += (~done).long()
            done = done | self._stops(finished, scores.amax(1), length, limits, norms)
            if check_due(step, device) or length == longest:
                left = int((~done).sum())
                if left == 0:
                    break
                if select is not None and worth_leaving(left, rows.shape[0]):
                    stay = (~done).nonzero()[:, 0]
                    result = result.written(rows, finished)
                    state = select(state, stay)
                    rows, finished, limits, done = rows[stay], finished.rows(stay), limits[stay], done[stay]
                    scores, tokens, parents = scores[stay], tokens[stay], parents[stay]
                    prefix = prefix if prefix is None else prefix[stay]
                    places = torch.zeros_like(places).index_copy(0, rows, torch.arange(left, device=device))
            state = model.reorder(state, parents)

        return _hypotheses(result.written(rows, finished), self.n_best, lattice, iterations, model.pad_id)

    def _capacity(self) -> int:
        return max(self.n_best, round(self.patience * self.beam_size))

    def _norms(self, longest: int, device: torch.device) -> Tensor:
        """norm(length) for lengths 0 .. longest + 1, float32."""
        lengths = torch.arange(longest + 2, dtype=torch.float64, device=device)
        if self.normalization == "none":
            return torch.ones_like(lengths, dtype=torch.float32)
        base = lengths.clamp(min=1) if self.normalization == "power" else (5 + lengths) / 6
        return (base**self.length_penalty).float()

    def _candidates(
        self, logits: Tensor, scores: Tensor, prefix: Tensor | None, at_limit: Tensor | None, never: int, eos_id: int
    ) -> BeamTopK:
        """The best continuations of each sentence, in order; enough that K are left without eos and what is banned."""
        R, K, V = logits.shape
        if prefix is not None and prefix.shape[2] >= self.no_repeat_ngram:
            logits, scores = _without_repeats(logits, scores, prefix, self.no_repeat_ngram)
        # one parent wastes at most one candidate on eos and on each token that is never generated
        found = beam_topk(logits, scores, min(K * (2 + never), K * V), impl=self.impl)
        if at_limit is None:
            return found
        # each kept hypothesis and its eos, unsorted: all K of them finish
        ending = torch.full_like(found.scores, -torch.inf)
        ending[:, :K] = scores + log_prob_of(logits, eos_id)
        column = at_limit[:, None]
        return BeamTopK(
            scores=torch.where(column, ending, found.scores),
            parents=torch.where(column, torch.arange(ending.shape[1], device=logits.device) % K, found.parents),
            tokens=found.tokens.masked_fill(column, eos_id),
        )

    def _stops(self, finished: _Finished, best: Tensor, length: int, limits: Tensor, norms: Tensor) -> Tensor:
        """Sentences [R] that are finished after `length` tokens, `best` [R] being their best unfinished sum."""
        over = (limits <= length) | (best == -torch.inf)
        if self.stopping == "first":
            return over | (finished.scores[:, -1] > -torch.inf)
        if self.stopping == "heuristic":
            return over | ((finished.scores[:, -1] > -torch.inf) & (finished.scores[:, -1] >= best / norms[length]))
        # Admissible: log-probabilities are at most 0, so what follows a kept hypothesis of sum c has a sum c' <= c <=
        # best <= 0, and ends at a length l with length < l <= limit and l >= min_length. norm is positive, so it scores
        # c' / norm(l) <= best / norm(l); and as best <= 0, that is greatest where norm(l) is. norm is l**a,
        # ((5+l)/6)**a or 1, monotone in l, rising for a >= 0 and falling for a < 0: greatest at the last or the first
        # of these l. Nothing above best / norm(that l) can follow, so the n_best stand once their last is not below it.
        if self.length_penalty >= 0:
            most = norms[limits]
        else:
            most = norms[torch.clamp(limits, max=max(length + 1, self.min_length))]
        return over | (finished.scores[:, self.n_best - 1] >= best / most)


class _Column(NamedTuple):
    """What one step kept of each sentence in the batch; the columns are the lattice of the search."""

    scores: Tensor  # [R, K] float32, sums of log-probabilities, -inf where nothing is kept
    parents: Tensor  # [R, K] int64, places in the previous column
    tokens: Tensor  # [R, K] int64
    places: Tensor  # [B] int64, row of each sentence


@dataclass(frozen=True)
class _Finished:
    """The best finished hypotheses of each sentence, [R, H] each, best first; score -inf where there are fewer."""

    scores: Tensor  # float32, normalised
    sums: Tensor  # float32, of log-probabilities
    parents: Tensor  # int64, which kept hypothesis of the column before it ends
    lengths: Tensor  # int64, eos included

    @classmethod
    def empty(cls, rows: int, capacity: int, device: torch.device) -> _Finished:
        nothing = torch.full((rows, capacity), -torch.inf, device=device)
        zeros = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        return cls(nothing, nothing, zeros, zeros + 1)

    def merged(self, sums: Tensor, parents: Tensor, length: int, norm: Tensor) -> _Finished:
        """With the hypotheses [R, C] that end at this length, -inf being none."""
        scores, order = torch.cat([self.scores, sums / norm], 1).sort(dim=1, descending=True, stable=True)
        capacity = self.scores.shape[1]
        order = order[:, :capacity]
        return _Finished(
            scores[:, :capacity],
            torch.cat([self.sums, sums], 1).gather(1, order),
            torch.cat([self.parents, parents], 1).gather(1, order),
            torch.cat([self.lengths, torch.full_like(parents, length)], 1).gather(1, order),
        )

    def rows(self, rows: Tensor) -> _Finished:
        return _Finished(self.scores[rows], self.sums[rows], self.parents[rows], self.lengths[rows])

    def written(self, rows: Tensor, other: _Finished) -> _Finished:
        """With `rows` [R] replaced by those of `other`."""
        return _Finished(
            self.scores.index_copy(0, rows, other.scores),
            self.sums.index_copy(0, rows, other.sums),
            self.parents.index_copy(0, rows, other.parents),
            self.lengths.index_copy(0, rows, other.lengths),
        )


def _barred(tokens: Tensor, banned: list[int], eos_id: int, at_limit: Tensor | None) -> Tensor:
    """Where `tokens` [R, C] must not be used; eos may always be at a sentence's limit."""
    barred = is_any(tokens, banned)
    return barred if at_limit is None else barred & ~((tokens == eos_id) & at_limit[:, None])


def _first(wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the first k true of `wanted` [R, C], and where there are fewer: [R, k] each."""
    columns = torch.arange(wanted.shape[1], device=wanted.device)
    order = torch.where(wanted, columns, columns + wanted.shape[1]).topk(k, largest=False, sorted=True).values
    return order % wanted.shape[1], order >= wanted.shape[1]


def _without_repeats(logits: Tensor, scores: Tensor, prefix: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits [R, K, V] of -inf for each token that would repeat n tokens of `prefix` [R, K, t], t >= n, and scores
    [R, K] lowered by what the others' normalisation gains, so that their sums stay the model's."""
    windows = prefix.unfold(2, n, 1)  # [R, K, t - n + 1, n]
    recent = prefix[:, :, None, prefix.shape[2] - n + 1 :]
    repeats = (windows[..., :-1] == recent).all(-1)
    # the minimum, because a token may stand in several windows of which one bans it
    bans = torch.where(repeats, -torch.inf, torch.inf).to(logits.dtype)
    masked = logits.scatter_reduce(2, windows[..., -1], bans, "amin")
    shift = log_sum(masked) - log_sum(logits)
    return masked, scores + shift.nan_to_num(nan=-torch.inf)


def _hypotheses(finished: _Finished, n: int, lattice: list[_Column], iterations: Tensor, pad_id: int) -> Hypotheses:
    """Follow the parents of the n best finished hypotheses back to the first token."""
    B, device = iterations.shape[0], iterations.device
    scores, sums = finished.scores[:, :n], finished.sums[:, :n]
    slots, lengths = finished.parents[:, :n], finished.lengths[:, :n] - 1
    longest = int(lengths.max())
    tokens = torch.full((longest, B, n), pad_id, dtype=torch.int64, device=device)
    totals = torch.zeros(longest + 1, B, n, device=device)
    for step in reversed(range(longest)):
        column = lattice[step]
        inside = step < lengths
        tokens[step] = torch.where(inside, column.tokens[column.places].gather(1, slots), pad_id)
        totals[step] = column.scores[column.places].gather(1, slots)
        slots = torch.where(inside, column.parents[column.places].gather(1, slots), slots)
    steps = torch.arange(longest + 1, device=device)[:, None, None]
    totals = torch.where(steps == lengths, sums, totals)
    before = torch.cat([torch.zeros(1, B, n, device=device), totals[:-1]])
    return Hypotheses(
        tokens=tokens.permute(1, 2, 0).contiguous(),
        lengths=lengths.contiguous(),
        scores=scores.contiguous(),
        token_log_probs=torch.where(steps <= lengths, totals - before, 0.0).permute(1, 2, 0).contiguous(),
        iterations=iterations,
    )
