"""Refinement ops against torch eager and against one read of the logits; each result is checked before it is timed.

Run: `pytest benchmarks/bench_refinement.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds`.
The floor of row_stats is torch.amax: it reads every logit once and does nothing else worth time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.refinement import RowStats, commit, remask, row_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(32, 32000), (2048, 32000), (256, 128256)]  # [N, V]
CANVASES = [(8, 64), (64, 64), (64, 512)]  # [B, T]
DTYPES = [torch.float32, torch.bfloat16]


def eager_row_stats(logits: Tensor) -> RowStats:
    p = logits.float().softmax(-1)
    top = p.topk(2).values
    return RowStats(p.argmax(-1), top[:, 0].log(), top[:, 0] - top[:, 1], torch.special.entr(p).sum(-1))


def eager_draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.float().softmax(-1)
    token = torch.multinomial(p, 1)
    return token, p.gather(1, token).log()


def eager_remask(scores: Tensor, count: Tensor, maskable: Tensor) -> Tensor:
    order = scores.masked_fill(~maskable, torch.inf).argsort(dim=1, stable=True)
    return torch.zeros_like(maskable).scatter_(1, order, torch.arange(scores.shape[1], device=DEVICE) < count[:, None])


def eager_threshold(stats: RowStats, canvas: Tensor, maskable: Tensor, threshold: float) -> Tensor:
    confidence = stats.log_prob.exp().masked_fill(~maskable, -1)
    chosen = confidence >= threshold
    chosen.scatter_(1, confidence.argmax(1, keepdim=True), True)
    return torch.where(chosen & maskable, stats.token, canvas)


def timed(benchmark, group: str, call):
    def run():
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = group
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads(), device=DEVICE)
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("what", ["row_stats", "row_stats drawing", "eager", "eager drawing", "amax (floor)"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_stats(benchmark, shape, dtype, what):
    torch.manual_seed(0)
    logits = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    got, want = row_stats(logits), eager_row_stats(logits)
    tied = want.margin == 0
    assert torch.equal(got.token[~tied], want.token[~tied])
    for name in ("log_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
    call = {
        "row_stats": lambda: row_stats(logits),
        "row_stats drawing": lambda: row_stats(logits, temperature=1.0),
        "eager": lambda: eager_row_stats(logits),
        "eager drawing": lambda: eager_draw(logits),
        "amax (floor)": lambda: torch.amax(logits, -1),
    }[what]
    timed(benchmark, f"row_stats {shape} {dtype}", call)


@pytest.mark.parametrize("what", ["remask", "eager"])
@pytest.mark.parametrize("shape", CANVASES, ids=str)
def test_remask(benchmark, shape, what):
    torch.manual_seed(1)
    scores = torch.rand(shape, device=DEVICE).log()
    maskable = torch.arange(shape[1], device=DEVICE) < torch.randint(1, shape[1] + 1, (shape[0], 1), device=DEVICE)
    count = maskable.sum(1) // 2
    assert torch.equal(remask(scores, count, maskable=maskable), eager_remask(scores, count, maskable))
    call = {
        "remask": lambda: remask(scores, count, maskable=maskable),
        "eager": lambda: eager_remask(scores, count, maskable),
    }[what]
    timed(benchmark, f"remask {shape}", call)


@pytest.mark.parametrize("what", ["commit", "eager"])
@pytest.mark.parametrize("shape", CANVASES, ids=str)
def test_commit_by_threshold(benchmark, shape, what):
    torch.manual_seed(2)
    p = torch.rand(shape, device=DEVICE)
    stats = RowStats(torch.randint(0, 100, shape, device=DEVICE), p.log(), p, p)
    canvas = torch.full(shape, 100, device=DEVICE)
    maskable = torch.rand(shape, device=DEVICE) < 0.6
    maskable[:, 0] = True

    def ours() -> Tensor:
        return commit(stats, canvas, maskable=maskable, policy="threshold", threshold=0.9).tokens

    assert torch.equal(ours(), eager_threshold(stats, canvas, maskable, 0.9))
    call = {"commit": ours, "eager": lambda: eager_threshold(stats, canvas, maskable, 0.9)}[what]
    timed(benchmark, f"commit {shape}", call)
