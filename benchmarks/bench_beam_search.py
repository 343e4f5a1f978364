"""The steps of a beam search against torch, the selection against one read: pytest benchmarks/bench_beam_search.py

The floor is torch.amax: it reads every logit once and does nothing else worth time. The floor of a whole search is a
model of which every step takes a known time, called as often.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from condgen_fast.decode import BeamSearch, decode
from condgen_fast.ops.beam_search import (
    BeamConstraints,
    BeamRules,
    BeamState,
    BeamTopK,
    Candidates,
    beam_topk,
    beam_update,
)

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


class TimedModel:
    """A StepModel that has its logits ready and takes `seconds` to hand them out; eos is only for the limit.

    It multiplies matrices meanwhile, as models do: what follows finds the threads awake and the caches used.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, B: int, K: int, V: int, seconds: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.seconds, self.calls, self.vocab_size = torch.device(device), seconds, 0, V
        self.logits = (3 * torch.randn(2, B, K, self.vocab_size, generator=generator)).to(device)
        self.logits[..., self.eos_id] = -40.0
        self.inputs, self.weights = torch.randn(64, 512, device=device), torch.randn(8, 512, 512, device=device)

    def encode(self, source: Tensor, source_lengths: Tensor) -> None:
        return None

    def start(self, memory: None, beam_size: int) -> None:
        return None

    def step(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
        end = time.perf_counter() + self.seconds
        self.calls += 1
        while time.perf_counter() < end:
            self.inputs @ self.weights[self.calls % 8]
        return self.logits[self.calls % 2], None

    def reorder(self, state: None, parents: Tensor) -> None:
        return None


# milliseconds that a step of our Transformer takes on two cores: of the base size, and of the one that is shipped
STEPS = [(32, 4, 32000, 36.0), (8, 4, 32000, 11.0), (1, 4, 32000, 5.0), (1, 4, 4000, 0.4)]
OPTIONS = {
    "plain": BeamSearch(beam_size=4, max_length=32),
    "heuristic, 4-best, no repeated 3-grams, bans": BeamSearch(
        beam_size=4, n_best=4, max_length=32, stopping="heuristic", no_repeat_ngram=3, banned=tuple(range(100, 120))
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("B", "K", "V", "milliseconds"), STEPS, ids=[f"B{B}-K{K}-V{V}" for B, K, V, _ in STEPS])
def test_bookkeeping(compare, device, B, K, V, milliseconds, options):
    model = TimedModel(B, K, V, milliseconds / 1000, device)
    source = torch.full((B, 32), 5, device=device)
    beam = OPTIONS[options]
    found = decode(model, source, beam)
    assert (found.iterations == 32).all() and (found.lengths == 31).all()
    tokens = torch.zeros(B, K, dtype=torch.int64, device=device)

    def model_alone() -> None:
        for _ in range(32):
            model.step(tokens, None)

    compare(
        "beam search outside the model",
        f"B{B} K{K} V{V} T32, step {milliseconds:g} ms, {options}",
        lambda: decode(model, source, beam),
        peers={},
        floor=("the model alone", model_alone),
    )


@pytest.mark.parametrize(("B", "K"), [(1, 4), (32, 5), (8, 64)])
def test_beam_update(compare, device, B, K):
    """What follows the selection, in the middle of a long search: every call is a step of it."""
    constraints = BeamConstraints(
        ends=torch.tensor([2], device=device),
        banned=torch.tensor([0, 1], device=device),
        always_banned=2,
        allowed=torch.tensor([2], device=device),
        prefix_lengths=torch.empty(0, dtype=torch.int64, device=device),
    )
    steps = 3000
    limits, norms = torch.full((B,), steps, device=device), torch.arange(steps + 2, device=device).float().clamp(min=1)
    ours, torchs = (
        BeamState.start(BeamRules("exact", K, 1), constraints, limits, norms, beams=K, first_token=1) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    ranks = -10 * torch.rand(B, 2 * K, generator=generator).sort(1).values.to(device)
    parents, tokens = (torch.randint(2, K + 2, (B, 2 * K), generator=generator).to(device) for _ in range(2))
    found = Candidates(ranks, ranks, parents % K, tokens)
    beam_update(ours, found)
    beam_update(torchs, found, impl="reference")
    for one, other in zip(ours.changed[:7], torchs.changed[:7], strict=True):
        assert torch.equal(one, other)
    compare(
        "beam_update",
        f"B{B} K{K}",
        lambda: beam_update(ours, found),
        peers={"torch": lambda: beam_update(torchs, found, impl="reference")},
    )
