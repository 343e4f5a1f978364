"""Selection of a beam step against torch eager and against one read of the logits; checked before it is timed.

Run: `pytest benchmarks/bench_beam_search.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds`.
The floor is torch.amax: it reads every logit once and does nothing else worth time. On glibc the eager form, whose
temporaries are as large as the logits, also pays for memory that is returned and faulted in again at each call; with
`MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296` in the environment it does not. Report both.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.beam_search import BeamTopK, beam_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(32, 5, 32000, 10), (8, 4, 32000, 8), (1, 4, 32000, 8), (32, 4, 50265, 64), (64, 64, 1000, 64)]  # B, K, V, k
DTYPES = [torch.float32, torch.bfloat16]


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


@pytest.mark.parametrize("what", ["beam_topk", "eager", "row topk and merge", "amax (floor)"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beam_topk(benchmark, shape, dtype, what):
    B, K, V, k = shape
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, K, V, generator=generator)).to(DEVICE, dtype)
    scores = (-10 * torch.rand(B, K, generator=generator)).to(DEVICE)
    call = {
        "beam_topk": lambda: beam_topk(logits, scores, k),
        "eager": lambda: eager(logits, scores, k),
        "row topk and merge": lambda: row_topk_and_merge(logits, scores, k),
        "amax (floor)": lambda: torch.amax(logits, -1),
    }[what]
    if what != "amax (floor)":
        got, exact = call(), eager(logits.double(), scores.double(), k)
        torch.testing.assert_close(got.scores, exact.scores, rtol=1e-5, atol=1e-5, check_dtype=False)
        totals = scores[..., None] + logits.float().log_softmax(-1)
        chosen = totals.flatten(1).gather(1, got.parents * V + got.tokens)
        torch.testing.assert_close(got.scores, chosen, rtol=1e-5, atol=1e-5)

    def run():
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"beam_topk {shape} {dtype}"
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=DEVICE,
        malloc_trim_threshold=os.environ.get("MALLOC_TRIM_THRESHOLD_", "default"),
    )
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
