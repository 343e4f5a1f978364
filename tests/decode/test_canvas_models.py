"""CMLM and LevT under their strategies: what is computed once, or for some positions only, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from condgen_fast import _library
from condgen_fast.decode import Hypotheses, LevenshteinRefinement, MaskPredict, decode
from condgen_fast.models import compiled
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer

SHAPE = dict(vocab_size=61, width=24, feed_forward=40, encoder_layers=1, decoder_layers=3, heads=3)
HEADS = [
    {},
    {"deletion_layers": 2, "insertion_layers": 2},
    {"deletion_layers": 1, "insertion_layers": 2},
    {"deletion_layers": 3},
    {"share_decoder": False},
    {"share_decoder": False, "deletion_layers": 1, "insertion_layers": 2},
]
heads = pytest.mark.parametrize("options", HEADS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
needs_library = pytest.mark.skipif(not _library.load(), reason="the compiled library is not built")


class Without:
    """A model that lacks some of its members."""

    def __init__(self, model: Any, *names: str):
        self._model, self._names = model, names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._model, name)


def lively(model: Any) -> Any:
    """Weights large enough that outputs differ and edits happen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model.eval()


def levenshtein(**options: Any) -> LevenshteinTransformer:
    torch.manual_seed(1)
    return lively(LevenshteinTransformer(LevenshteinConfig(**SHAPE, max_insert=4, **options)))


def sentences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, 61, (n,), generator=generator).tolist() for n in lengths]


def assert_same(a: Hypotheses, b: Hypotheses) -> None:
    for name in ("tokens", "lengths", "scores", "token_log_probs", "iterations"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@needs_library
@heads
def test_levt_a_pass_shared_by_two_heads_changes_no_bit(options):
    model, source = levenshtein(**options), sentences(9, 3, 1, 14, 6, 6)
    shares = options in (HEADS[0], HEADS[1], HEADS[3])
    assert model.shares_edit_states == shares
    strategy = LevenshteinRefinement(max_iterations=6)
    found = decode(model, source, strategy)
    assert_same(found, decode(Without(model, "shares_edit_states"), source, strategy))
    assert found.lengths.max() > 3 and found.iterations.max() > 2


@heads
def test_levt_compiled_and_by_its_modules(options, monkeypatch):
    model, source = levenshtein(**options), sentences(9, 3, 1, 14, 6, 6)
    with torch.no_grad():
        memory = model.encode(torch.tensor(source[:1]), torch.tensor([9]))
        canvas = torch.tensor([[2, 7, 4, 9, 4, 3]])
        calls = (model.delete_logits, model.insert_logits, model.fill)
        ours = [call(canvas, memory) for call in calls]
        monkeypatch.setattr(compiled, "stands_in", lambda *modules: False)
        monkeypatch.setattr(compiled, "fits", lambda value: False)
        memory = model.encode(torch.tensor(source[:1]), torch.tensor([9]))
        for got, want in zip(ours, [call(canvas, memory) for call in calls], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@heads
def test_levt_heads_read_the_layers_they_are_told(options):
    model = levenshtein(**options)
    depths = [options.get("deletion_layers") or 3, options.get("insertion_layers") or 3, 3]
    source, canvas = torch.tensor(sentences(9)), torch.tensor([[2, 7, 4, 9, 4, 3]])

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            memory = model.encode(source, torch.tensor([9]))
            return [call(canvas, memory) for call in (model.delete_logits, model.insert_logits, model.fill)]

    decoders = [model.deletion_decoder or model.decoder, model.insertion_decoder or model.decoder, model.decoder]
    for layer in range(3):
        before = outputs()
        with torch.no_grad():
            model.decoder.layers[layer].feed_forward.outer.bias.add_(torch.randn(24))
        for depth, decoder, a, b in zip(depths, decoders, before, outputs(), strict=True):
            assert torch.equal(a, b) == (layer >= depth or decoder is not model.decoder)


@needs_library
@pytest.mark.parametrize("iterations", [1, 4, 10])
def test_cmlm_projecting_masked_positions_only_changes_no_bit(iterations):
    torch.manual_seed(2)
    model = lively(CMLM(CMLMConfig(**SHAPE, length_offset=6)))
    source, strategy = sentences(9, 3, 1, 14, 6, 6), MaskPredict(iterations=iterations, length_beam=3, n_best=3)
    found = decode(model, source, strategy)
    assert_same(found, decode(Without(model, "fill_states", "project"), source, strategy))


@needs_library
@pytest.mark.parametrize("kind", ["cmlm", "levenshtein"])
def test_a_sentence_has_the_same_bits_in_any_batch(kind):
    torch.manual_seed(3)
    if kind == "cmlm":
        model, strategy = lively(CMLM(CMLMConfig(**SHAPE, length_offset=6))), MaskPredict(iterations=5)
    else:
        model, strategy = levenshtein(), LevenshteinRefinement(max_iterations=6)
    source = sentences(9, 3, 1, 14, 6, 6)
    whole = decode(model, source, strategy)
    for b, sentence in enumerate(source):
        alone = decode(model, [sentence], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[b] and alone.iterations[0] == whole.iterations[b]
        assert torch.equal(alone.scores[0], whole.scores[b])
        width = int(alone.lengths.max()) + 1
        assert torch.equal(alone.token_log_probs[0], whole.token_log_probs[b, :, :width])


def test_training_still_has_gradients():
    model = levenshtein().train()
    memory = model.encode(torch.tensor(sentences(9)), torch.tensor([9]))
    canvas = torch.tensor([[2, 7, 4, 9, 4, 3]])
    total = sum(call(canvas, memory).sum() for call in (model.delete_logits, model.insert_logits, model.fill))
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        memory = model.eval().encode(torch.tensor(sentences(9)), torch.tensor([9]))
    assert model.fill(canvas, memory).requires_grad, "a memory made without gradients does not turn them off"
