"""Refinement loops of a GPU: the same results from what was recorded once and replayed."""

from __future__ import annotations

import pytest
import torch
from masked_models import ALL_POLICIES, POLICIES
from refinement_helpers import MASK, Lagging, SharedStates
from replayed import left_behind, replayed
from small_refiners import model_of, same, sources

from condgen_fast.decode import (
    BlockDiffusion,
    IterativeRefinement,
    LevenshteinRefinement,
    MaskPredict,
    block_diffusion,
    decode,
    iterative_refinement,
    levenshtein,
    mask_predict,
)
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig


@pytest.fixture(params=[True, False], ids=["leaving", "staying"])
def on_a_gpu(monkeypatch, request):
    """Call this to have the loops of a GPU run, from there on; who has finished leaves at every chance, or never."""

    def leaves(left, rows):
        return request.param and left < rows

    def turn():
        monkeypatch.setattr(levenshtein, "host_follows", lambda device: False)
        monkeypatch.setattr(mask_predict, "_captured", lambda *_: True)
        monkeypatch.setattr(block_diffusion, "host_follows", lambda device: False)
        for module in (iterative_refinement, block_diffusion):
            monkeypatch.setattr(module, "Running", Lagging)
        for module in (levenshtein, iterative_refinement):
            monkeypatch.setattr(module, "worth_capturing_anew", lambda left, rows, *_: leaves(left, rows))
        monkeypatch.setattr(BlockDiffusion, "_leaves", lambda self, left, now, _: leaves(left, len(now.rows)))

    return turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "modules"])
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("CMLM", MaskPredict(iterations=6)),
        ("CMLM", MaskPredict(iterations=10, length_beam=3)),
        ("LevT", LevenshteinRefinement(max_iterations=6)),
        ("LevT", LevenshteinRefinement(eos_penalty=1.0)),
        ("CMLM", IterativeRefinement()),
    ],
    ids=str,
)
def test_canvases_of_an_encoder(kind, strategy, dtype, on_a_gpu, monkeypatch):
    model = model_of(kind).to(dtype)
    expected = decode(model, sources(), strategy)
    on_a_gpu()
    with replayed(monkeypatch) as recordings:
        found = decode(model, sources(), strategy)
    assert recordings
    same(found, expected)


@pytest.mark.parametrize("seed", [2, 4, 8])
def test_states_that_two_heads_read_are_those_of_the_canvas_after_deletions(seed, on_a_gpu, monkeypatch):
    model, strategy = SharedStates(seed=seed), LevenshteinRefinement(initial=[[7, 8, 9, 10, 5]] * 7)
    expected = decode(model, sources(), strategy)
    on_a_gpu()
    with replayed(monkeypatch) as recordings:
        found = decode(model, sources(), strategy)
    assert recordings
    same(found, expected)


@ALL_POLICIES
def test_block_diffusion(policy, on_a_gpu, monkeypatch):
    """Without the prefix cache, on the CPU the model reads as much of that as is needed, which changes."""
    torch.manual_seed(0)
    config = MaskedLMConfig(vocab_size=40, width=32, feed_forward=64, encoder_layers=2, heads=2, block_length=4)
    model = MaskedLM(config).double().eval()
    canvases = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    strategy = BlockDiffusion(max_length=13, policy=policy, prefix_cache=False, **POLICIES[policy])
    expected = decode(model, canvases, strategy)
    on_a_gpu()
    with replayed(monkeypatch) as recordings:
        found = decode(model, canvases, strategy)
    assert recordings
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.iterations, expected.iterations)
    torch.testing.assert_close(found.token_log_probs, expected.token_log_probs)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("CMLM", MaskPredict(iterations=4)), ("LevT", LevenshteinRefinement(max_iterations=4)), ("CMLM", "refine")],
    ids=str,
)
def test_no_graph_outlives_its_call(kind, strategy, on_a_gpu, monkeypatch):
    model = model_of(kind)
    on_a_gpu()
    assert not left_behind(lambda: decode(model, sources(), strategy), monkeypatch)
