"""BlockDiffusion on the real model: with and without its prefix cache, and as a GPU runs it."""

from __future__ import annotations

import pytest
import torch
from masked_models import (
    ALL_POLICIES,
    POLICIES,
)
from refinement_helpers import MASK, HostReads

from condgen_fast.decode import BlockDiffusion, block_diffusion, decode
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
def test_on_a_gpu_the_same_result_comes_without_a_host_read_in_a_pass(policy, cache, block_causal, monkeypatch):
    """The path that a GPU takes, here on the CPU: blocks are projected whole, the host asks every eighth pass."""
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    options = dict(max_length=13, policy=policy, temperature=1.0, seed=1, prefix_cache=cache, **POLICIES[policy])

    def reads(prompts):
        with HostReads() as host:
            result = decode(block_causal, prompts, BlockDiffusion(**options))
        return result, host.count

    plain, _ = reads(sources)
    monkeypatch.setattr(block_diffusion, "_counted_by_host", lambda device: False)
    monkeypatch.setattr(block_diffusion, "check_due", lambda step, device: (step + 1) % 8 == 0)
    monkeypatch.setattr(
        block_causal, "extend", lambda *call: extend_without_reading(block_causal, *call), raising=False
    )
    result, count = reads(sources)
    assert torch.equal(result.tokens, plain.tokens) and torch.equal(result.iterations, plain.iterations)
    torch.testing.assert_close(result.token_log_probs, plain.token_log_probs)
    few = {**options, "max_length": 1}
    with HostReads() as host:
        decode(block_causal, sources, BlockDiffusion(**few))
    # 13 masks are 12 passes more, and cached blocks further ones; two reads at each check.
    assert count <= host.count + 2 * 3


def extend_without_reading(model, tokens, start, prefix):
    """`extend` with what it asks of the host (how far keys are needed, on the CPU) answered beforehand."""
    with torch.utils._python_dispatch._disable_current_modes():
        return MaskedLM.extend(model, tokens, start, prefix)


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
