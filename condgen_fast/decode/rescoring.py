"""Noisy parallel decoding (Gu et al. 2018): an autoregressive teacher chooses among another model's candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.canvas import best_first
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import StepModel, missing_members
from condgen_fast.decode.scoring import score


@dataclass(frozen=True)
class Rescored:
    """What `strategy` finds, ordered by what `teacher` says of it.

    The `n_best` hypotheses of `strategy` are read by `teacher` in one batch, and `Hypotheses.scores` and
    `token_log_probs` are the teacher's: the sum of log-probabilities, eos included, over length ** length_penalty,
    length counting eos where there is one. Ties keep the order of `strategy`; places for which it has no hypothesis
    (length 0, score -inf) stay last. A trace, asked for by the option of `strategy`, remains that of the hypothesis
    which that found best.

        decode(cmlm, source, Rescored(MaskPredict(n_best=5), teacher))

    Source: "Non-Autoregressive Neural Machine Translation", arXiv:1711.02281, section 4.2 (noisy parallel decoding).
    """

    # Any strategy with several hypotheses a sentence.
    strategy: Any
    # A `StepModel` with the same token ids.
    teacher: StepModel
    # Hypotheses returned per sentence; at most as many as `strategy` returns.
    n_best: int = 1
    # Exponent of the length that sums are divided by; 1: the mean, 0: the sum.
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.strategy, (str, type)) or not hasattr(self.strategy, "run"):
            raise TypeError(f"strategy must be one such as MaskPredict(n_best=5); got {self.strategy!r}")
        if missing := missing_members(self.teacher, StepModel):
            raise TypeError(f"teacher must be a StepModel; {type(self.teacher).__name__} has no {', '.join(missing)}")
        found = getattr(self.strategy, "n_best", 1)
        check_number(self.n_best, "n_best", minimum=1, maximum=found, integer=True)
        check_number(self.length_penalty, "length_penalty", minimum=0.0)

    @property
    def model_protocol(self) -> type | tuple[type, ...]:
        return getattr(self.strategy, "model_protocol", ())

    def run(self, model: Any, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]."""
        from condgen_fast.decode import _eval_mode, _traced

        for name in ("vocab_size", "pad_id", "bos_id", "eos_id"):
            if getattr(model, name) != getattr(self.teacher, name):
                raise ValueError(
                    f"teacher must have the model's {name}, {getattr(model, name)}; got {getattr(self.teacher, name)}"
                )
        found = _traced(self.strategy.run(model, source, source_lengths), model, self.strategy)
        exists = (found.lengths > 0) | (found.scores > -torch.inf)
        real = replace(found, scores=torch.zeros_like(found.scores).masked_fill(~exists, -torch.inf))
        with _eval_mode(self.teacher):
            log_probs = score(self.teacher, source, real, source_lengths=source_lengths)
        counted = (found.lengths + found.ended.long()).clamp(min=1).double()
        scores = log_probs.double().sum(2) / counted**self.length_penalty
        scores, order = best_first(scores.float(), exists, self.n_best)

        def reordered(values: Tensor) -> Tensor:
            return values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))

        lengths = found.lengths.gather(1, order)
        longest = int(lengths.max())
        return replace(
            found,
            tokens=reordered(found.tokens)[..., :longest],
            lengths=lengths,
            scores=scores,
            token_log_probs=reordered(log_probs)[..., : longest + 1],
            ended=found.ended.gather(1, order),
        )
