"""Selection of a beam step against torch and against one read of the logits: pytest benchmarks/bench_beam_search.py

The floor is torch.amax: it reads every logit once and does nothing else worth time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.beam_search import BeamTopK, beam_topk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(32, 5, 32000, 10), (8, 4, 32000, 8), (1, 4, 32000, 8), (32, 4, 50265, 64), (64, 64, 1000, 64)]


def eager(logits: Tensor, scores: Tensor, k: int) -> BeamTopK:
    totals = scores[..., None] + logits.float().log_softmax(-1)
    best, index = totals.flatten(1).topk(k)
    return BeamTopK(best, index // logits.shape[-1], index % logits.shape[-1])


def row_topk_and_merge(logits: Tensor, scores: Tensor, k: int) -> BeamTopK:
    """The best k of each row before its normalisation: what a careful loop of torch ops does."""
    best, tokens = logits.topk(min(k, logits.shape[-1]))
    totals = (scores - logits.float().logsumexp(-1))[..., None] + best.float()
    best, index = totals.flatten(1).topk(k)
    return BeamTopK(best, index // tokens.shape[-1], tokens.flatten(1).gather(1, index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "V", "k"), SHAPES, ids=[f"B{B}-K{K}-V{V}-k{k}" for B, K, V, k in SHAPES])
def test_beam_topk(compare, device, B, K, V, k, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, K, V, generator=generator)).to(device, DTYPES[dtype])
    scores = (-10 * torch.rand(B, K, generator=generator)).to(device)
    exact = eager(logits.double(), scores.double(), k)
    totals = scores[..., None] + logits.float().log_softmax(-1)
    for select in (beam_topk, eager, row_topk_and_merge):
        got = select(logits, scores, k)
        torch.testing.assert_close(got.scores, exact.scores, rtol=1e-5, atol=1e-5, check_dtype=False)
        chosen = totals.flatten(1).gather(1, got.parents * V + got.tokens)
        torch.testing.assert_close(got.scores, chosen, rtol=1e-5, atol=1e-5)
    compare(
        "beam_topk",
        f"B{B} K{K} V{V} k{k} {dtype}",
        lambda: beam_topk(logits, scores, k),
        peers={
            "eager torch": lambda: eager(logits, scores, k),
            "careful torch": lambda: row_topk_and_merge(logits, scores, k),
        },
        floor=("torch.amax", lambda: torch.amax(logits, -1)),
    )
