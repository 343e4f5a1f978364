"""Small random refinement models of ours, and what their results are compared by."""

from __future__ import annotations

from typing import Any

import torch

from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer

SIZE = dict(vocab_size=29, width=16, feed_forward=32, encoder_layers=1, decoder_layers=2, heads=2)


def same(a, b) -> None:
    assert a.to_lists() == b.to_lists()
    assert torch.equal(a.token_log_probs, b.token_log_probs) and torch.equal(a.scores, b.scores)
    assert torch.equal(a.iterations, b.iterations) and torch.equal(a.lengths, b.lengths)


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "CMLM":
        model = CMLM(CMLMConfig(**SIZE, length_offset=4))
    else:
        model = LevenshteinTransformer(LevenshteinConfig(**SIZE, max_insert=3, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.eval()


def sources(count: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 29, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 6, 12, 2)[:count]]
