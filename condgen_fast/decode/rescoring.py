"""Noisy parallel decoding (Gu et al. 2018): an autoregressive teacher chooses among another model's candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import StepModel, missing_members


@dataclass(frozen=True)
class Rescored:
    """What `strategy` finds, ordered by what `teacher` says of it.

    The `n_best` hypotheses of `strategy` are read by `teacher` in one batch, and `Hypotheses.scores` and
    `token_log_probs` are the teacher's: the sum of log-probabilities, eos included, over length ** length_penalty,
    length counting eos. Ties keep the order of `strategy`; hypotheses that it counts as none (score -inf) stay last.
    A trace remains that of the hypothesis `strategy` found best.

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
    def model_protocol(self) -> type | None:
        return getattr(self.strategy, "model_protocol", None)

    def run(self, model: Any, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]."""
        from condgen_fast.decode import _eval_mode

        for name in ("vocab_size", "pad_id", "bos_id", "eos_id"):
            if getattr(model, name) != getattr(self.teacher, name):
                raise ValueError(
                    f"teacher must have the model's {name}, {getattr(model, name)}; got {getattr(self.teacher, name)}"
                )
        found = self.strategy.run(model, source, source_lengths)
        with _eval_mode(self.teacher):
            log_probs = forced_log_probs(self.teacher, source, source_lengths, found.tokens, found.lengths)
        scores = log_probs.double().sum(2) / (found.lengths + 1).double() ** self.length_penalty
        scores = scores.float().masked_fill(found.scores == -torch.inf, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : self.n_best], order[:, : self.n_best]

        def reordered(values: Tensor) -> Tensor:
            return values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))

        lengths = found.lengths.gather(1, order)
        longest = int(lengths.max())
        none = scores == -torch.inf
        return replace(
            found,
            tokens=reordered(found.tokens)[..., :longest],
            lengths=lengths,
            scores=scores,
            token_log_probs=reordered(log_probs)[..., : longest + 1].masked_fill(none[..., None], 0.0),
        )


def forced_log_probs(
    model: StepModel, source: Tensor, source_lengths: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """float32 [B, n, L+1]: what `model` gives each token of [B, n, L] after those before it; eos's after the last.

    Equivalent to teacher forcing: ``log_softmax`` of the logits of ``[bos, *tokens]``, gathered at ``[*tokens, eos]``.
    """
    batch, n, width = tokens.shape
    position = torch.arange(width + 1, device=tokens.device)
    padded = torch.nn.functional.pad(tokens, (0, 1), value=model.pad_id)
    targets = torch.where(position == lengths[..., None], model.eos_id, padded)
    state = model.start(model.encode(source, source_lengths), n)
    last, columns = torch.full((batch, n), model.bos_id, device=tokens.device), []
    for t in range(width + 1):
        logits, state = model.step(last, state)
        last = targets[..., t]
        chosen = logits.gather(2, last[..., None])[..., 0].float()
        columns.append(chosen - logits.float().logsumexp(2))
    return torch.stack(columns, 2).masked_fill(position > lengths[..., None], 0.0)
