"""Toy masked language models without encoder for the tests of BlockDiffusion."""

from __future__ import annotations

import pytest
import torch
from refinement_helpers import BOS, EOS, MASK, PAD, sure
from torch import Tensor

VOCABULARY = 17
POLICIES = {
    "quota": {"steps": 3},
    "threshold": {"threshold": 0.15},
    "margin": {"threshold": 0.05},
    "entropy": {"threshold": 4.0},
}
ALL_POLICIES = pytest.mark.parametrize("policy", POLICIES)


class ToyLM:
    """A masked language model without encoder; `seen` keeps what it was shown, `rows` how many canvases each time."""

    pad_id, bos_id, eos_id, mask_id, vocab_size = PAD, BOS, EOS, MASK, VOCABULARY

    def __init__(self, device: str = "cpu"):
        self.device, self.rows, self.seen = device, [], []

    def fill(self, tokens: Tensor, memory: None) -> Tensor:
        assert memory is None
        real = tokens != PAD
        assert not (real[:, 1:] & ~real[:, :-1]).any(), "padding inside a canvas"
        self.rows.append(len(tokens))
        self.seen.append(tokens.clone())
        return self.logits(tokens)


class RandomLM(ToyLM):
    """Logits from a random table, by position, the tokens on both sides and the canvas's length."""

    def __init__(self, *, eos: bool = True, seed: int = 0, device: str = "cpu"):
        super().__init__(device)
        self.table = torch.randn(997, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(device)
        if not eos:
            self.table[:, EOS] = -torch.inf

    def logits(self, tokens: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tokens, (1, 1), value=PAD)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        length = (tokens != PAD).sum(1, keepdim=True)
        context = padded[:, :-2] * 7 + tokens * 13 + padded[:, 2:] * 17 + position * 5 + length
        return self.table[context % 997]


class ScriptedLM(ToyLM):
    """Says (token, probability) at every position of a canvas, as `script(canvas)` gives it."""

    def __init__(self, script, **options):
        super().__init__(**options)
        self.script = script

    def logits(self, tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, VOCABULARY), torch.nan)  # what is not asked for must not be read
        for b, row in enumerate(tokens.tolist()):
            canvas = [t for t in row if t != PAD]
            for i, (token, probability) in enumerate(self.script(canvas)):
                logits[b, i] = torch.tensor(sure(token, probability, VOCABULARY))
        return logits


def by_position(choices):
    """The same (token, probability) at a position, whatever the canvas."""
    return ScriptedLM(lambda canvas: [choices[i % len(choices)] for i in range(len(canvas))])


def written_per_pass(trace):
    return [sum(step.touched) for step in trace.steps if step.operation == "commit"]
