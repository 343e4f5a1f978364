"""Refinement ops against torch and against one read of the logits: pytest benchmarks/bench_refinement.py

The floor of row_stats is torch.amax: it reads every logit once and does nothing else worth time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.refinement import RowStats, commit, remask, row_stats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(32, 32000), (2048, 32000), (256, 128256)]
CANVASES = [(8, 64), (64, 64), (64, 512)]

canvases = pytest.mark.parametrize(("B", "T"), CANVASES, ids=[f"B{B}-T{T}" for B, T in CANVASES])


def eager_row_stats(logits: Tensor) -> RowStats:
    p = logits.float().softmax(-1)
    top = p.topk(2).values
    return RowStats(p.argmax(-1), top[:, 0].log(), top[:, 0] - top[:, 1], torch.special.entr(p).sum(-1))


def careful_row_stats(logits: Tensor) -> RowStats:
    """One search for the top two, and the entropy from log_softmax in place: two temporaries instead of five."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    top, tokens = logits.topk(2)
    top = log_p.gather(1, tokens)
    margin = top[:, 0].exp() - top[:, 1].exp()
    return RowStats(tokens[:, 0], top[:, 0], margin, -log_p.mul_(log_p.exp()).sum(-1))


def eager_draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.float().softmax(-1)
    token = torch.multinomial(p, 1)
    return token, p.gather(1, token).log()


def careful_draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest of exponential variables with rates p: what decoding loops use instead of multinomial."""
    p = logits.softmax(-1, dtype=torch.float32)
    token = (torch.empty_like(p).exponential_() / p).argmin(-1, keepdim=True)
    return token, p.gather(1, token).log()


def eager_remask(scores: Tensor, count: Tensor, maskable: Tensor) -> Tensor:
    order = scores.masked_fill(~maskable, torch.inf).argsort(dim=1, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    return torch.zeros_like(maskable).scatter_(1, order, chosen)


def eager_threshold(stats: RowStats, canvas: Tensor, maskable: Tensor, threshold: float) -> Tensor:
    confidence = stats.log_prob.exp().masked_fill(~maskable, -1)
    chosen = confidence >= threshold
    chosen.scatter_(1, confidence.argmax(1, keepdim=True), True)
    return torch.where(chosen & maskable, stats.token, canvas)


@pytest.mark.parametrize("variant", ["greedy", "draw"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V"), SHAPES, ids=[f"N{N}-V{V}" for N, V in SHAPES])
def test_row_stats(compare, device, N, V, dtype, variant):
    torch.manual_seed(0)
    logits = (torch.randn(N, V, device=device) * 3).to(DTYPES[dtype])
    floor = ("torch.amax", lambda: torch.amax(logits, -1))
    case = f"{variant} N{N} V{V} {dtype}"
    if variant == "greedy":
        want = eager_row_stats(logits)
        tied = want.margin == 0
        for got in (row_stats(logits), careful_row_stats(logits)):
            assert torch.equal(got.token[~tied], want.token[~tied])
            for name in ("log_prob", "margin", "entropy"):
                torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
        peers = {"eager torch": lambda: eager_row_stats(logits), "careful torch": lambda: careful_row_stats(logits)}
        compare("row_stats", case, lambda: row_stats(logits), peers=peers, floor=floor)
    else:
        drawn = row_stats(logits, temperature=1.0)
        log_p = logits.log_softmax(-1, dtype=torch.float32)
        torch.testing.assert_close(drawn.log_prob, log_p.gather(1, drawn.token[:, None])[:, 0], rtol=1e-4, atol=1e-5)
        peers = {"eager torch": lambda: eager_draw(logits), "careful torch": lambda: careful_draw(logits)}
        compare("row_stats", case, lambda: row_stats(logits, temperature=1.0), peers=peers, floor=floor)


def test_row_stats_all_five(compare, device):
    """Token drawn, its log-probability, margin, entropy and the most probable token, against all of them in eager."""
    torch.manual_seed(0)
    logits = torch.randn(2048, 32000, device=device) * 3
    got, want = row_stats(logits, temperature=1.0), eager_row_stats(logits)
    tied = want.margin == 0
    assert torch.equal(got.best[~tied], want.token[~tied])
    for name in ("margin", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
    peers = {
        "eager softmax, topk and entropy": lambda: eager_row_stats(logits),
        "the same and multinomial": lambda: (eager_row_stats(logits), eager_draw(logits)),
    }
    floor = ("torch.amax", lambda: torch.amax(logits, -1))
    compare(
        "row_stats", "all five N2048 V32000 fp32", lambda: row_stats(logits, temperature=1.0), peers=peers, floor=floor
    )


@canvases
def test_remask(compare, device, B, T):
    torch.manual_seed(1)
    scores = torch.rand(B, T, device=device).log()
    maskable = torch.arange(T, device=device) < torch.randint(1, T + 1, (B, 1), device=device)
    count = maskable.sum(1) // 2

    def ours() -> Tensor:
        return remask(scores, count, maskable=maskable)

    def eager() -> Tensor:
        return eager_remask(scores, count, maskable)

    assert torch.equal(ours(), eager())
    compare("remask", f"B{B} T{T}", ours, peers={"eager torch": eager})


@canvases
def test_commit_by_threshold(compare, device, B, T):
    torch.manual_seed(2)
    p = torch.rand(B, T, device=device)
    stats = RowStats(torch.randint(0, 100, (B, T), device=device), p.log(), p, p)
    canvas = torch.full((B, T), 100, device=device)
    maskable = torch.rand(B, T, device=device) < 0.6
    maskable[:, 0] = True

    def ours() -> Tensor:
        return commit(stats, canvas, maskable=maskable, policy="threshold", threshold=0.9).tokens

    def eager() -> Tensor:
        return eager_threshold(stats, canvas, maskable, 0.9)

    assert torch.equal(ours(), eager())
    compare("commit", f"threshold B{B} T{T}", ours, peers={"eager torch": eager})


def eager_entropy(stats: RowStats, canvas: Tensor, maskable: Tensor, bound: float) -> Tensor:
    entropy, order = stats.entropy.masked_fill(~maskable, torch.inf).sort(dim=1, stable=True)
    before = entropy.cumsum(1) - entropy
    chosen = torch.zeros_like(maskable).scatter_(1, order, (before <= bound) & entropy.isfinite())
    return torch.where(chosen, stats.token, canvas)


@canvases
def test_commit_by_entropy(compare, device, B, T):
    torch.manual_seed(3)
    entropy = torch.rand(B, T, device=device).double().mul_(2**20).round_().div_(2**20).float()  # sums are exact
    stats = RowStats(torch.randint(0, 100, (B, T), device=device), -entropy, entropy, entropy)
    canvas = torch.full((B, T), 100, device=device)
    maskable = torch.rand(B, T, device=device) < 0.6
    maskable[:, 0] = True

    def ours() -> Tensor:
        return commit(stats, canvas, maskable=maskable, policy="entropy", threshold=T / 32, minimum=0).tokens

    def eager() -> Tensor:
        return eager_entropy(stats, canvas, maskable, T / 32)

    assert torch.equal(ours(), eager())
    compare("commit", f"entropy B{B} T{T}", ours, peers={"eager torch": eager})
