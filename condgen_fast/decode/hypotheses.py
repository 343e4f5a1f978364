"""The result of decoding, the same for every strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hypotheses:
    """The `n` best hypotheses of each of `B` sentences, best first, on the model's device.

    tokens           [B, n, L] int64, without bos and eos, padded with pad_id
    lengths          [B, n] int64, tokens of each hypothesis
    scores           [B, n] float32, what the strategy ranks by; where fewer than n hypotheses exist the rest have
                     length 0 and score -inf
    token_log_probs  [B, n, L+1] float32, log-probability of each token; that of eos stands after the last token,
                     0 beyond
    ended            [B, n] bool, whether eos follows the last token: everywhere (None stands for that), but for what a
                     beam search with `compat` has cut at the limit, and canvases of block diffusion without eos
    iterations       [B] int64, rounds that ran for the sentence (steps, for left-to-right decoding)
    trace            what the strategy did to each sentence, round by round (`condgen_fast.decode.trace`); None unless
                     it was asked for
    lattice          everything that a beam search kept (`condgen_fast.decode.finished.Lattice`); None unless it was
                     asked for
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    token_log_probs: Tensor
    iterations: Tensor
    ended: Tensor | None = None
    trace: Any = None
    lattice: Any = None

    def __post_init__(self) -> None:
        if self.ended is None:
            object.__setattr__(self, "ended", torch.ones_like(self.lengths, dtype=torch.bool))

    def to_lists(self) -> list[list[list[int]]]:
        """Token ids as lists: sentence, hypothesis, token."""
        return [
            [row[:length] for row, length in zip(rows, lengths, strict=True)]
            for rows, lengths in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        ]

    @classmethod
    def empty(cls, n: int, device: torch.device | None = None) -> Hypotheses:
        """The result for a batch of no sentences."""
        integers = dict(dtype=torch.int64, device=device)
        return cls(
            tokens=torch.empty(0, n, 0, **integers),
            lengths=torch.empty(0, n, **integers),
            scores=torch.empty(0, n, device=device),
            token_log_probs=torch.empty(0, n, 1, device=device),
            iterations=torch.empty(0, **integers),
        )
