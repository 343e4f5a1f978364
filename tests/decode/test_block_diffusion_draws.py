"""Draws of BlockDiffusion: what they follow and what they depend on."""

from __future__ import annotations

from collections import Counter

import torch
from masked_models import (
    VOCABULARY,
    RandomLM,
    ToyLM,
)
from refinement_helpers import EOS

from condgen_fast.decode import BlockDiffusion, block_diffusion, decode


def test_seeds_make_draws_reproducible_and_prompts_draw_apart():
    model = RandomLM()

    def texts(**options):
        strategy = BlockDiffusion(max_length=20, temperature=1.5, **options)
        return decode(model, [[5], [6], [5]], strategy).to_lists()

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts(seed=1)[0] == texts(seed=1)[2] != texts(seed=1)[1]
    torch.manual_seed(0)
    free = texts(), texts()
    torch.manual_seed(0)
    assert (texts(), texts()) == free and free[0] != free[1]
    cold = BlockDiffusion(max_length=20, temperature=1e-6, seed=1)
    assert decode(model, [[5]], cold).to_lists() == decode(model, [[5]], BlockDiffusion(max_length=20)).to_lists()


def test_every_pass_and_position_draws_anew(monkeypatch):
    drawn, real_row_stats = [], block_diffusion.row_stats

    def recorded(logits, **options):
        drawn.extend(options["noise_rows"].tolist())
        return real_row_stats(logits, **options)

    monkeypatch.setattr(block_diffusion, "row_stats", recorded)
    decode(RandomLM(eos=False), [[5], [6, 7]], BlockDiffusion(max_length=6, policy="quota", temperature=1.0))
    assert len(drawn) == 2 * (6 + 5 + 4 + 3 + 2 + 1) and len(set(drawn)) == len(drawn)


def test_draws_follow_the_softmax():
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[[EOS, 5, 6, 7]] = torch.tensor([0.0, 1.0, 2.0, 0.5])

    class Fixed(ToyLM):
        def logits(self, tokens):
            return logits.expand(*tokens.shape, -1).clone()

    sources = [[5 + i % 11, 5 + i // 11 % 11, 5 + i // 121] for i in range(1331)]
    for temperature in (0.7, 2.0):
        result = decode(Fixed(), sources, "block_diffusion", max_length=1, temperature=temperature, seed=0)
        counts = Counter(row[0][0] if row[0] else EOS for row in result.to_lists())
        want = (logits / temperature).softmax(0)
        statistic = sum((counts[t] - 1331 * want[t]) ** 2 / (1331 * want[t]) for t in (EOS, 5, 6, 7))
        assert statistic < 16.3  # 3 degrees of freedom, p = 0.001
        got = result.token_log_probs[:, 0, 0]
        longer = decode(
            Fixed(), sources, "block_diffusion", max_length=2, block_length=1, temperature=temperature, seed=0
        )
        ended = result.lengths[:, 0] == 0  # a draw depends on the prompt, not on how much follows it
        assert torch.equal(ended, longer.lengths[:, 0] == 0)
        assert torch.equal(result.tokens[~ended, 0, 0], longer.tokens[~ended, 0, 0])
        possible = logits.log_softmax(0)[[EOS, 5, 6, 7]]  # of temperature 1
        assert ((got[:, None] - possible).abs().amin(1) < 1e-5).all()
