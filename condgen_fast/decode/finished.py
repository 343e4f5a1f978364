"""The finished hypotheses of a beam search, and the way back from them through the lattice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condgen_fast.decode.hypotheses import Hypotheses


@dataclass(frozen=True)
class Lattice:
    """Everything a beam search kept: `BeamSearch(keep_lattice=True)` returns it as `Hypotheses.lattice`.

    Step t kept K hypotheses of t + 1 tokens in each sentence; slot k continues slot parents[t, b, k] of step t - 1
    with tokens[t, b, k]. After a sentence has finished, and where fewer than K were kept, scores are -inf.
    """

    tokens: Tensor  # [T, B, K] int64
    parents: Tensor  # [T, B, K] int64
    scores: Tensor  # [T, B, K] float32, sums of log-probabilities
    ranks: Tensor  # [T, B, K] float32, what they were chosen by: the scores, unless groups or noise change them

    @classmethod
    def of_steps(cls, steps: list[tuple[Tensor, ...]]) -> Lattice:
        """Of each step tokens, parents, scores and ranks [R, K], and the row [B] that each sentence had."""
        whole = all(places is steps[0][4] for *_, places in steps)  # no sentence has left the batch
        columns = zip(*((step[:4] if whole else [part[step[4]] for part in step[:4]]) for step in steps), strict=True)
        return cls(*(torch.stack(column) for column in columns))

    def until(self, iterations: Tensor) -> Lattice:
        """Without what came after a sentence had finished, `iterations` [B] being its steps."""
        steps = torch.arange(self.tokens.shape[0], device=iterations.device)[:, None, None]
        after = steps >= iterations[:, None]
        scores, ranks = (part.masked_fill(after, -torch.inf) for part in (self.scores, self.ranks))
        return Lattice(self.tokens, self.parents, scores, ranks)

    def prefixes(self, step: int) -> Tensor:
        """The hypotheses [B, K, step + 1] that were kept at a step, token by token."""
        slots = torch.arange(self.tokens.shape[2], device=self.tokens.device).expand_as(self.tokens[0])
        columns = []
        for t in range(step, -1, -1):
            columns.append(self.tokens[t].gather(1, slots))
            slots = self.parents[t].gather(1, slots)
        return torch.stack(columns[::-1], 2)


@dataclass(frozen=True)
class Finished:
    """The best finished hypotheses of each sentence, [R, H] each, best first; score -inf where there are fewer."""

    scores: Tensor  # float32, normalised
    sums: Tensor  # float32, of log-probabilities
    parents: Tensor  # int64, which hypothesis kept a step before it continues
    tokens: Tensor  # int64, with what it ends
    lengths: Tensor  # int64, its tokens, this one included

    @classmethod
    def empty(cls, rows: int, capacity: int, device: torch.device) -> Finished:
        nothing = torch.full((rows, capacity), -torch.inf, device=device)
        zeros = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        return cls(nothing, nothing, zeros, zeros - 1, zeros + 1)

    def merged(self, scores: Tensor, sums: Tensor, parents: Tensor, tokens: Tensor, length: int) -> Finished:
        """With the hypotheses [R, C] that end at this length, a score of -inf being none."""
        scores, order = torch.cat([self.scores, scores], 1).sort(dim=1, descending=True, stable=True)
        order = order[:, : self.scores.shape[1]]
        return Finished(
            scores[:, : self.scores.shape[1]],
            torch.cat([self.sums, sums], 1).gather(1, order),
            torch.cat([self.parents, parents], 1).gather(1, order),
            torch.cat([self.tokens, tokens], 1).gather(1, order),
            torch.cat([self.lengths, torch.full_like(parents, length)], 1).gather(1, order),
        )

    def _columns(self) -> tuple[Tensor, ...]:
        return self.scores, self.sums, self.parents, self.tokens, self.lengths

    def rows(self, rows: Tensor) -> Finished:
        return Finished(*(column[rows] for column in self._columns()))

    def written(self, rows: Tensor, other: Finished) -> Finished:
        """With `rows` [R] replaced by those of `other`."""
        pairs = zip(self._columns(), other._columns(), strict=True)
        return Finished(*(column.index_copy(0, rows, new) for column, new in pairs))

    def of_groups(self, groups: int) -> Finished:
        """The groups [B * groups, H] of each sentence merged, best first."""
        if groups == 1:
            return self
        columns = [column.reshape(-1, groups * column.shape[1]) for column in self._columns()]
        order = columns[0].sort(dim=1, descending=True, stable=True).indices
        return Finished(*(column.gather(1, order) for column in columns))


def hypotheses_of(
    finished: Finished, n: int, lattice: Lattice, ends: list[int], iterations: Tensor, pad_id: int
) -> Hypotheses:
    """Follow the parents of the n best finished hypotheses back to the first token."""
    B, device = iterations.shape[0], iterations.device
    finished = Finished(*(column[:, :n] for column in finished._columns()))
    ended = finished.tokens < 0  # no hypothesis at all
    for end in ends:
        ended = ended | (finished.tokens == end)
    places = finished.lengths - 1  # where the last token stands, be it eos or not
    longest = int(places.max())
    tokens = torch.full((longest + 1, B, n), pad_id, dtype=torch.int64, device=device)
    totals = torch.zeros(longest + 1, B, n, device=device)
    slots = finished.parents
    for step in reversed(range(longest)):
        inside = step < places
        tokens[step] = torch.where(inside, lattice.tokens[step].gather(1, slots), pad_id)
        totals[step] = lattice.scores[step].gather(1, slots)
        slots = torch.where(inside, lattice.parents[step].gather(1, slots), slots)
    steps = torch.arange(longest + 1, device=device)[:, None, None]
    tokens = torch.where((steps == places) & ~ended, finished.tokens, tokens)
    totals = torch.where(steps == places, finished.sums, totals)
    before = torch.cat([torch.zeros(1, B, n, device=device), totals[:-1]])
    log_probs = torch.where(steps <= places, totals - before, 0.0)
    lengths = finished.lengths - ended.long()
    width = int(lengths.max())
    log_probs = torch.nn.functional.pad(log_probs.permute(1, 2, 0), (0, width - longest))
    return Hypotheses(
        tokens=tokens[:width].permute(1, 2, 0).contiguous(),
        lengths=lengths.contiguous(),
        scores=finished.scores.contiguous(),
        token_log_probs=log_probs.contiguous(),
        iterations=iterations,
        ended=ended,
    )
