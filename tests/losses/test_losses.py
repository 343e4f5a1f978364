"""The students' training losses: what is masked, dropped and rolled in, and the value on a model that is a table."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from condgen_fast.losses import levenshtein
from condgen_fast.losses.cmlm import cmlm_loss, mask_uniformly
from condgen_fast.losses.levenshtein import Policy, levenshtein_loss
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer

PAD, BOS, EOS, MASK = 0, 2, 3, 4
SMALL = {"vocab_size": 23, "width": 16, "feed_forward": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2}


@pytest.fixture
def batch():
    torch.manual_seed(3)
    target = torch.tensor([[BOS, 7, 8, 9, 10, EOS], [BOS, 11, 12, EOS, PAD, PAD]])
    return SimpleNamespace(source=target.clamp(min=5) % 20 + 3, source_lengths=torch.tensor([6, 4]), target=target)


def test_the_number_of_masked_tokens_is_uniform():
    torch.manual_seed(0)
    rows = 20_000
    maskable = torch.tensor([False, True, True, True, True, False]).expand(rows, 6)
    masked = mask_uniformly(torch.zeros(rows, 6, dtype=torch.int64), maskable)
    assert not masked[:, [0, 5]].any()
    counts = masked.sum(1).bincount(minlength=5).tolist()
    assert counts[0] == 0
    for count in counts[1:]:  # rows / 4 each; 5 standard deviations
        assert abs(count - rows / 4) < 5 * math.sqrt(rows * 3 / 16)
    for share in masked[:, 1:5].float().mean(0).tolist():  # (1 + 2 + 3 + 4) / 16
        assert abs(share - 0.625) < 0.02


def test_cmlm_loss_is_cross_entropy_where_it_is_masked(batch):
    model = CMLM(CMLMConfig(**SMALL)).eval()
    torch.manual_seed(5)
    losses = cmlm_loss(model, batch, label_smoothing=0.1, length_weight=0.25)
    torch.manual_seed(5)
    inner = batch.target > MASK
    masked = mask_uniformly(batch.target, inner)
    memory = model.encode(batch.source, batch.source_lengths)
    logits = model.fill(batch.target.masked_fill(masked, MASK), memory)
    tokens = F.cross_entropy(logits[masked], batch.target[masked], label_smoothing=0.1)
    difference = inner.sum(1) - batch.source_lengths  # the length head predicts that to the source's length
    length = F.cross_entropy(model.length_offset_logits(memory), difference + model.config.length_offset)
    torch.testing.assert_close(losses["tokens"], tokens)
    torch.testing.assert_close(losses["length"], length)
    torch.testing.assert_close(losses["loss"], tokens + 0.25 * length)


def test_levenshtein_loss_from_the_empty_canvas(batch, monkeypatch):
    """full_mask = 1: one slot that wants all words, all words to fill, and deletion learns from what was filled in."""
    model = LevenshteinTransformer(LevenshteinConfig(**SMALL)).eval()
    losses = levenshtein_loss(model, batch, label_smoothing=0.1, policy=Policy(full_mask=1.0))
    memory = model.encode(batch.source, batch.source_lengths)
    empty = torch.tensor([[BOS, EOS]]).repeat(2, 1)
    insertion = F.cross_entropy(model.insert_logits(empty, memory)[:, 0], torch.tensor([4, 2]), label_smoothing=0.01)
    inner = batch.target > MASK
    logits = model.fill(batch.target.masked_fill(inner, MASK), memory)[inner]
    token = F.cross_entropy(logits, batch.target[inner], label_smoothing=0.1)
    logits[:, [PAD, BOS, EOS, MASK]] = -torch.inf
    rollin = batch.target.masked_scatter(inner, logits.argmax(-1))
    delete = levenshtein.edit_oracle(rollin, batch.target, pad_id=PAD).delete
    deletion = F.cross_entropy(model.delete_logits(rollin, memory)[inner], delete[inner].long())
    for name, value in {"insertion": insertion, "token": token, "deletion": deletion}.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], insertion + token + deletion)


@pytest.mark.parametrize("special", [PAD, BOS, EOS, MASK])
def test_no_special_token_is_rolled_in(special, batch, monkeypatch):
    """A model that is sure of one has it excluded as in decoding; a pad inside a row would be refused as bad input."""
    model = LevenshteinTransformer(LevenshteinConfig(**SMALL)).eval()
    seen = []
    project, delete_logits = model.project, model.delete_logits
    monkeypatch.setattr(model, "project", lambda h: project(h) + 1e4 * F.one_hot(torch.tensor(special), 23))
    monkeypatch.setattr(model, "delete_logits", lambda tokens, m: seen.append(tokens) or delete_logits(tokens, m))
    levenshtein_loss(model, batch, policy=Policy(full_mask=1.0))
    assert bool((seen[0][batch.target > MASK] != special).all())


def test_mixtures_choose_their_roll_ins(batch, monkeypatch):
    model = LevenshteinTransformer(LevenshteinConfig(**SMALL)).eval()
    seen = {}
    for name in ("insert_logits", "delete_logits"):
        call = getattr(model, name)
        monkeypatch.setattr(model, name, lambda t, m, n=name, c=call: seen.update({n: t}) or c(t, m))
    levenshtein_loss(model, batch, policy=Policy(alpha=1.0, beta=1.0))  # y0 is empty
    assert (seen["insert_logits"][:, :2] == torch.tensor([BOS, EOS])).all() and (
        seen["insert_logits"][:, 2:] == PAD
    ).all()
    assert (seen["delete_logits"][:, :2] == torch.tensor([BOS, EOS])).all() and (
        seen["delete_logits"][:, 2:] == PAD
    ).all()
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]; got -3"):
        levenshtein_loss(model, batch, policy=Policy(beta=-3))


def test_noise_makes_the_initial_sequence(batch, monkeypatch):
    """With initial_noise y0 is gold with words replaced: what deletion sees at alpha = 1; at beta = 1 insertion sees
    what the oracle leaves of it, which is nothing where no new word stands in gold."""
    model = LevenshteinTransformer(LevenshteinConfig(**SMALL)).eval()
    seen = {}
    for name in ("insert_logits", "delete_logits"):
        call = getattr(model, name)
        monkeypatch.setattr(model, name, lambda t, m, n=name, c=call: seen.update({n: t}) or c(t, m))
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: torch.full(size, low))
    inner = batch.target > MASK
    levenshtein_loss(model, batch, policy=Policy(alpha=1.0, beta=1.0, initial_noise=1.0))
    assert torch.equal(seen["delete_logits"], batch.target.masked_fill(inner, MASK + 1))
    assert (seen["insert_logits"] > MASK).sum() == 0
    levenshtein_loss(model, batch, policy=Policy(alpha=1.0, beta=1.0, initial_noise=1e-9))
    assert torch.equal(seen["delete_logits"], batch.target) and torch.equal(seen["insert_logits"], batch.target)


def test_counts_beyond_the_largest_are_taken_as_the_largest(batch):
    model = LevenshteinTransformer(LevenshteinConfig(**SMALL, max_insert=3)).eval()
    insertion = levenshtein_loss(model, batch, policy=Policy(full_mask=1.0))["insertion"]
    memory = model.encode(batch.source, batch.source_lengths)
    logits = model.insert_logits(torch.tensor([[BOS, EOS]]).repeat(2, 1), memory)[:, 0]
    torch.testing.assert_close(insertion, F.cross_entropy(logits, torch.tensor([3, 2]), label_smoothing=0.01))
