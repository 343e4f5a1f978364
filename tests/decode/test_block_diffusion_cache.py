"""BlockDiffusion on the real model: with and without its prefix cache, and as a GPU runs it."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from fake_gpu import Apart, Launches, fake_gpu
from masked_models import (
    ALL_POLICIES,
    POLICIES,
)
from refinement_helpers import MASK, Lagging

from condgen_fast.decode import BlockDiffusion, block_diffusion, decode
from condgen_fast.decode.blocks import Canvases
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig


@pytest.fixture(scope="module")
def block_causal():
    torch.manual_seed(0)
    config = MaskedLMConfig(vocab_size=40, width=32, feed_forward=64, encoder_layers=2, heads=2, block_length=4)
    return MaskedLM(config).double().eval()


@ALL_POLICIES
def test_the_prefix_cache_changes_nothing_but_the_work(policy, block_causal, monkeypatch):
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    widths = []
    real_extend = MaskedLM.extend
    monkeypatch.setattr(
        MaskedLM,
        "extend",
        lambda self, tokens, *rest: widths.append(tokens.shape[1]) or real_extend(self, tokens, *rest),
    )
    for length, temperature in ((None, 0.0), (4, 1.0), (8, 0.0)):
        options = dict(max_length=13, block_length=length, policy=policy, temperature=temperature, seed=1, trace=True)
        widths.clear()
        cached = decode(block_causal, sources, BlockDiffusion(**options, **POLICIES[policy]))
        assert widths[0] == 12 // (length or 4) * (length or 4) and set(widths[1:]) == {length or 4}
        widths.clear()
        plain = decode(block_causal, sources, BlockDiffusion(**options, **POLICIES[policy], prefix_cache=False))
        assert not widths
        assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.iterations, plain.iterations)
        torch.testing.assert_close(cached.token_log_probs, plain.token_log_probs)
        for a, b in zip(cached.trace, plain.trace, strict=True):
            assert [(s.iteration, s.tokens, s.touched) for s in a.steps] == [
                (s.iteration, s.tokens, s.touched) for s in b.steps
            ]


@ALL_POLICIES
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("temperature", "leaving"), [(0.0, False), (0.0, True), (1.0, True)])
def test_as_a_gpu_runs_it_the_result_is_the_same(policy, cache, temperature, leaving, block_causal, monkeypatch):
    """Blocks are projected whole, tensors stay where they are, and the host is a pass behind."""
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    options = dict(max_length=13, policy=policy, temperature=temperature, seed=1, prefix_cache=cache)
    strategy = BlockDiffusion(**options, **POLICIES[policy])
    plain = decode(block_causal, sources, strategy)
    monkeypatch.setattr(block_diffusion, "host_follows", lambda device: False)
    monkeypatch.setattr(block_diffusion, "Running", Lagging)
    monkeypatch.setattr(BlockDiffusion, "_leaves", lambda self, left, now, _: leaving and left < len(now.rows))
    result = decode(block_causal, sources, strategy)
    assert torch.equal(result.tokens, plain.tokens) and torch.equal(result.iterations, plain.iterations)
    torch.testing.assert_close(result.token_log_probs, plain.token_log_probs)


# Operations of a pass that would be launched beside the model's.
LAUNCHES = {"quota": 7, "threshold": 0, "margin": 0, "entropy": 1}


@torch.no_grad()
@ALL_POLICIES
@pytest.mark.parametrize("cache", [True, False])
def test_no_pass_waits(policy, cache, monkeypatch):
    with fake_gpu(monkeypatch) as device:
        config = MaskedLMConfig(vocab_size=40, width=32, feed_forward=64, encoder_layers=2, heads=2, block_length=4)
        model = MaskedLM(config).eval().to(device)
        ids, rows = (
            torch.empty(3, 12, dtype=torch.int64, device=device),
            torch.empty(3, dtype=torch.int64, device=device),
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__int__", lambda self: 12)  # of the longest canvas, which is asked for once
            now = Canvases.start(model, ids, rows, rows, rows, 4, cache)
        strategy = BlockDiffusion(policy=policy, **POLICIES[policy])
        before = {f.name: getattr(now, f.name) for f in fields(now)}
        with Launches() as count:
            strategy._pass(Apart(model), now, 0)
        assert all(getattr(now, name) is value for name, value in before.items())
        changed = [now.tokens, now.log_probs, now.running, now.block, now.counted, now.due, now.passes]
        assert len({tensor.untyped_storage()._cdata for tensor in changed}) == len(changed)
        assert count.counts.total() <= (29 if cache else 37) + LAUNCHES[policy], count.counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL_POLICIES
@pytest.mark.parametrize("cache", [True, False])
def test_captured_equals_not_captured_equals_the_cpu(policy, cache, block_causal, monkeypatch):
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    strategy = BlockDiffusion(max_length=13, policy=policy, prefix_cache=cache, **POLICIES[policy])
    results = [decode(block_causal, sources, strategy)]
    model = copy.deepcopy(block_causal).cuda()
    for capturable in (True, False):
        monkeypatch.setattr(MaskedLM, "capturable", capturable)
        results.append(decode(model, sources, strategy))
    for result in results[1:]:
        assert result.to_lists() == results[0].to_lists()
        assert result.iterations.tolist() == results[0].iterations.tolist()


def test_only_masks_of_the_block_are_projected(block_causal, monkeypatch):
    rows, real_project = [], MaskedLM.project
    monkeypatch.setattr(MaskedLM, "project", lambda self, x: rows.append(x.shape[0]) or real_project(self, x))
    for cache in (True, False):
        rows.clear()
        strategy = BlockDiffusion(max_length=0, policy="quota", steps=2, prefix_cache=cache)
        decode(block_causal, [[5] * 4 + [MASK] * 4, [MASK, 6, 7, 8]], strategy)
        assert [n for n in rows if n] == [5, 2]


def test_blocks_are_multiples_of_the_models_own(block_causal):
    with pytest.raises(ValueError, match="block_length must be a multiple of the model's 4; got 6"):
        decode(block_causal, [[5]], "block_diffusion", block_length=6)
