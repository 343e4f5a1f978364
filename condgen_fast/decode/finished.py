"""What a beam search returns: its finished hypotheses and, where asked for, everything that it kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.ops.beam_search import BeamState, beam_hypotheses


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
    def of(cls, beams: BeamState, steps: int) -> Lattice:
        """What `beams` kept in so many steps."""
        ids, totals = beams.lattice_ids[:, :steps], beams.lattice_totals[:, :steps]
        return cls(*ids.unbind(), totals[0], totals[-1])

    def until(self, iterations: Tensor) -> Lattice:
        """Without what came after a sentence had finished, `iterations` [B] being its steps."""
        steps = torch.arange(self.tokens.shape[0], device=iterations.device)[:, None, None]
        after = steps >= iterations[:, None]
        ids = (part.masked_fill(after, 0) for part in (self.tokens, self.parents))
        return Lattice(*ids, *(part.masked_fill(after, -torch.inf) for part in (self.scores, self.ranks)))

    def prefixes(self, step: int) -> Tensor:
        """The hypotheses [B, K, step + 1] that were kept at a step, token by token."""
        slots = torch.arange(self.tokens.shape[2], device=self.tokens.device).expand_as(self.tokens[0])
        columns = []
        for t in range(step, -1, -1):
            columns.append(self.tokens[t].gather(1, slots))
            slots = self.parents[t].gather(1, slots)
        return torch.stack(columns[::-1], 2)


def hypotheses_of(beams: BeamState, n: int, steps: int, pad_id: int, impl: str) -> Hypotheses:
    """The n best finished hypotheses of each sentence, followed back to their first token after so many `steps`."""
    ids, (scores, sums) = beams.finished_ids.flatten(2), beams.finished_totals.flatten(2)  # [B, G * H]
    if beams.groups > 1:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        sums, ids = sums.gather(1, order), ids.gather(2, order.expand(ids.shape))
    lattice = Lattice.of(beams, steps)
    parts = lattice.tokens, lattice.parents, lattice.scores, beams.constraints.ends
    tokens, lengths, log_probs = beam_hypotheses(ids[:, :, :n], sums[:, :n], *parts, pad_id, impl=impl)
    width = int(lengths.max())
    return Hypotheses(
        tokens=tokens[:, :, :width].contiguous(),
        lengths=lengths,
        scores=scores[:, :n].contiguous(),
        token_log_probs=log_probs[:, :, : width + 1].contiguous(),
        iterations=beams.progress[:-1],
        ended=lengths < ids[2, :, :n],
    )
