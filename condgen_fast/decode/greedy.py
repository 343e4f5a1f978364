"""Greedy search: the most probable token at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import check_lengths, end_ids, generate, is_any, never_generated
from condgen_fast.decode.protocols import StepModel
from condgen_fast.ops.beam_search import beam_topk


@dataclass(frozen=True)
class Greedy:
    """The most probable token at every step, until eos: `BeamSearch(beam_size=1, stopping="first")` for less work.

    min_length      tokens of the shortest hypothesis, eos included
    max_length      tokens of the longest, eos included; None: 2 * source length + 10, at most `model.max_positions`
    length_penalty  score = sum of log-probabilities / length ** length_penalty
    impl            implementation of `beam_topk`
    trace           record the tokens in `Hypotheses.trace`

    pad and bos are never generated. Ties go to the lower token. The log-probabilities are the model's own: a token that
    was not allowed keeps its share of the probability.
    """

    min_length: int = 0
    max_length: int | None = None
    length_penalty: float = 1.0
    impl: str = "auto"
    trace: bool = False

    model_protocol: ClassVar[type] = StepModel

    def __post_init__(self) -> None:
        check_lengths(self.min_length, self.max_length, self.length_penalty)
        check_choice(self.impl, "impl", ("auto", "reference"))

    def run(self, model: StepModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        never, ends = never_generated(model), end_ids(model)

        def choose(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            banned = never + ends * (step + 1 < self.min_length)
            return best_allowed(logits, banned, model.eos_id, self.impl)

        return generate(
            model,
            source,
            source_lengths,
            choose=choose,
            n=1,
            max_length=self.max_length,
            length_penalty=self.length_penalty,
        )


def best_allowed(logits: Tensor, banned: list[int], eos_id: int, impl: Any = "auto") -> tuple[Tensor, Tensor]:
    """The most probable token outside `banned` and its log-probability, [B, n] each, for logits [B, n, V].

    Where no such token has any probability: eos, -inf.
    """
    B, n, V = logits.shape
    top = beam_topk(
        logits.reshape(B * n, 1, V),
        torch.zeros(B * n, 1, device=logits.device),
        min(1 + len(banned), V),
        impl=impl,
    )
    barred = is_any(top.tokens, banned) | ~(top.scores > -torch.inf)
    first = barred.long().argmin(1, keepdim=True)
    nothing = barred.gather(1, first)
    tokens = top.tokens.gather(1, first).masked_fill(nothing, eos_id)
    log_probs = top.scores.gather(1, first).masked_fill(nothing, -torch.inf)
    return tokens.view(B, n), log_probs.view(B, n)
