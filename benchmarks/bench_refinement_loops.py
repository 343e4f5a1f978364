"""What refinement costs beside its model: pytest benchmarks/bench_refinement_loops.py

The loops of a base-size model of random weights, which is led along a plausible way, against the calls it made of its
model; projecting masked positions only against projecting all; LevT against beam search on the shipped models.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from recorded import Recorded
from shipped import shipped, sources
from torch import Tensor

from condgen_fast.decode import BeamSearch, Hypotheses, LevenshteinRefinement, MaskPredict, decode
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.layers import SIZES
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer

V, LENGTH = 32000, 24  # vocabulary; tokens of each source, and of about each output


class Led(LevenshteinTransformer):
    """Writes LENGTH tokens, deletes one, inserts two and is content; what its heads say is computed all the same."""

    capturable = False  # it counts its rounds

    def encode(self, source: Tensor, source_lengths: Tensor) -> Any:
        self.rounds = 0
        return super().encode(source, source_lengths)

    def delete_head(self, states: Tensor) -> Tensor:
        kept = super().delete_head(states) * 0 + torch.tensor([1.0, 0.0], device=states.device)
        kept[:, 5] = kept[:, 5].flip(-1) if self.rounds == 1 else kept[:, 5]
        return kept

    def insert_head(self, states: Tensor) -> Tensor:
        logits = super().insert_head(states) * 0
        logits[..., 0] = 1.0
        if self.rounds < 2:
            logits[:, 2 * self.rounds, LENGTH if self.rounds == 0 else 2] = 2.0
        self.rounds += 1
        return logits


class ProjectsAll:
    """A FillModel whose `fill` is all it offers."""

    def __init__(self, model: CMLM):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("fill_states", "project"):
            raise AttributeError(name)
        return getattr(self._model, name)


@cache
def base(kind: str, device: str) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": V, "max_positions": 128, **SIZES["base"]}
    model = CMLM(CMLMConfig(**size)) if kind == "Mask-Predict" else Led(LevenshteinConfig(**size))
    if kind == "Mask-Predict":  # the target as long as the source
        with torch.no_grad():
            model.length_head.weight.zero_()
            model.length_head.bias.copy_(-(torch.arange(129.0) - 64).abs())
    return model.eval().to(device)


def sentences(B: int, device: str) -> Tensor:
    return torch.randint(5, V, (B, LENGTH), generator=torch.Generator().manual_seed(B)).to(device)


@pytest.mark.parametrize("B", [8, 32])
@pytest.mark.parametrize("kind", ["Mask-Predict", "LevT"])
def test_loop(compare, device, kind, B):
    model, source = base(kind, device), sentences(B, device)
    strategy = MaskPredict(iterations=10, length_beam=1) if kind == "Mask-Predict" else LevenshteinRefinement()

    def ours(model: Any = model) -> Hypotheses:
        return decode(model, source, strategy)

    found, recorded = ours(), Recorded(model)
    assert torch.equal(ours(recorded).tokens, found.tokens)
    expected = (LENGTH, 10) if kind == "Mask-Predict" else (LENGTH + 1, 3)
    assert (found.lengths == expected[0]).all() and (found.iterations == expected[1]).all()
    compare(
        "refinement loop",
        f"{kind} base B{B} T{LENGTH} V{V} fp32",
        ours,
        peers={},
        floor=("the model alone", recorded.replay),
    )


@pytest.mark.parametrize("length_beam", [1, 3])
def test_masked_projection(compare, device, length_beam):
    model, source = base("Mask-Predict", device), sentences(8, device)
    strategy = MaskPredict(iterations=10, length_beam=length_beam)

    def ours(model: Any = model) -> Hypotheses:
        return decode(model, source, strategy)

    found, expected = ours(), ours(ProjectsAll(model))
    assert torch.equal(found.tokens, expected.tokens)
    if device == "cpu":  # bit for bit; elsewhere a matrix product's rows may depend on how many there are
        assert torch.equal(found.token_log_probs, expected.token_log_probs)
    compare(
        "CMLM decode",
        f"base B8 T{LENGTH} V{V} beam {length_beam} fp32",
        ours,
        peers={"projecting all positions": lambda: ours(ProjectsAll(model))},
    )


@pytest.mark.parametrize("eos_penalty", [0.0, 1.5])  # the default, and what is best on the valid set
def test_latency(compare, device, eos_penalty):
    """Eight sentences of the embedded test set, from the shortest to the longest, one by one."""

    def translator(name: str, strategy: Any) -> Any:
        model, _ = shipped(name, device)
        one_by_one = [torch.tensor([ids], device=device) for ids in sources(name, device, 8)]
        return lambda: [decode(model, source, strategy).tokens for source in one_by_one]

    ours = translator("levenshtein-en-de", LevenshteinRefinement(eos_penalty=eos_penalty))
    peers = {f"beam {size}": translator("transformer-en-de", BeamSearch(beam_size=size)) for size in (4, 5)}
    compare("decode with the shipped models", f"LevT penalty {eos_penalty} 8 x B1", ours, peers=peers)
