"""`score`: the values that a search reports, the gradient of teacher forcing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TableModel, random_table

from condgen_fast.decode import BeamSearch, Hypotheses, adapt, decode, score
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer


def transformer() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=20, width=16, heads=2, feed_forward=32, encoder_layers=1, decoder_layers=2)
    return Transformer(config).eval()


def test_values_are_token_log_probs():
    model = transformer()
    source = [[5, 6, 7, 3], [8, 9, 3], [4, 3]]
    found = decode(model, source, BeamSearch(beam_size=4, n_best=4, max_length=9))
    torch.testing.assert_close(score(model, source, found), found.token_log_probs, rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_teacher_forcing():
    model = transformer()
    source = torch.tensor([[5, 6, 7, 3], [8, 9, 3, model.pad_id]])
    found = decode(model, source, BeamSearch(beam_size=3, n_best=3, max_length=7))
    log_probs = score(model, source, found)
    cotangent = torch.randn(log_probs.shape)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((log_probs * cotangent).sum(), parameters, allow_unused=True)

    total = 0
    for b in range(2):
        for i, tokens in enumerate(found.to_lists()[b]):
            target = torch.tensor([[model.bos_id, *tokens]])
            lengths = torch.tensor([4 - b])
            logits = model.project(model(source[b : b + 1, : 4 - b], lengths, target))[0]
            expected = logits.log_softmax(-1)[torch.arange(len(tokens) + 1), [*tokens, model.eos_id]]
            total = total + (expected * cotangent[b, i, : len(tokens) + 1]).sum()
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    assert sum(grad is not None for grad in ours) > 10
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_step_by_step_models_cut_hypotheses_and_none():
    table = random_table(6, 499, 9, seed=3).requires_grad_()
    model = TableModel(table)
    source = [[s] for s in range(6)]
    cut = decode(model, source, BeamSearch(beam_size=4, n_best=2, compat="hf", max_length=3, banned=(0,)))
    assert (cut.lengths == 3).any()
    found = score(model, source, cut)
    torch.testing.assert_close(found, cut.token_log_probs, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert table.grad.isfinite().all() and (table.grad != 0).any()
    with torch.no_grad():
        table[1, :, :] = -torch.inf
    none = decode(model, source, BeamSearch(beam_size=2))
    assert none.scores[1, 0] == -torch.inf and (score(model, source, none)[1] == 0).all()


def test_eos_counts_where_a_hypothesis_has_ended():
    """Whoever found it: one that is certain of eos, or reports no probability of it, as LevT does."""
    model = TableModel(random_table(6, 499, 9, seed=3, eos_bias=1.0))
    source = [[s] for s in range(6)]
    found = decode(model, source, BeamSearch(beam_size=4, n_best=2, max_length=4))
    assert found.ended.dtype == torch.bool and found.ended.all()
    certain = replace(found, token_log_probs=torch.zeros_like(found.token_log_probs))
    torch.testing.assert_close(score(model, source, certain), found.token_log_probs, rtol=1e-5, atol=1e-5)
    by_hand = Hypotheses(found.tokens, found.lengths, found.scores, certain.token_log_probs, found.iterations)
    assert torch.equal(score(model, source, by_hand), score(model, source, found))

    cut = decode(model, source, BeamSearch(beam_size=4, n_best=2, compat="hf", max_length=3, banned=(0,)))
    assert cut.ended.any() and not cut.ended.all()
    assert torch.equal(cut.ended, cut.lengths < 3)
    of_eos = cut.token_log_probs.gather(2, cut.lengths[..., None])[..., 0]
    assert torch.equal(of_eos != 0, cut.ended)


def test_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=15, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32, pad_token_id=14,
        eos_token_id=0, decoder_start_token_id=14, init_std=0.5,
    )  # fmt: skip
    for forced in (None, 5):
        model = adapt(transformers.MarianMTModel(config).eval(), forced_bos_id=forced)
        source = [[3, 4, 0], [6, 0]]
        found = decode(model, source, BeamSearch(n_best=3, max_length=8))
        log_probs = score(model, source, found)
        torch.testing.assert_close(log_probs, found.token_log_probs, rtol=1e-4, atol=1e-4)
        log_probs.sum().backward()


def test_where_values_differ_from_those_of_the_search():
    """As its docstring says: which of several ends it was is not known, and bans of CTranslate2 are renormalised."""
    model = TableModel(random_table(3, 997, 9, seed=5, eos_bias=1.0))
    source = [[0], [1], [2]]
    several = TableModel(model.table)
    several.eos_ids = [1, 4]
    found = decode(several, source, BeamSearch(beam_size=3, n_best=3, max_length=6))
    log_probs = score(several, source, found)
    inside = torch.arange(log_probs.shape[2]) < found.lengths[..., None]
    torch.testing.assert_close(log_probs[inside], found.token_log_probs[inside])
    for options, differs in ((dict(), False), (dict(banned=(5,)), True), (dict(min_length=3), True)):
        beam = BeamSearch(beam_size=3, n_best=3, max_length=6, compat="ctranslate2", **options)
        found = decode(model, source, beam)
        of_steps = (score(model, source, found) - found.token_log_probs).abs()
        assert (of_steps.max() > 1e-3) == differs


def test_refuses_other_sentences():
    model = TableModel(random_table(2, 99, 5, seed=1))
    found = decode(model, [[0], [1]], "beam")
    with pytest.raises(ValueError, match="hypotheses must be of the 1 sentences of source; got 2"):
        score(model, [[0]], found)


def test_a_margin_loss_on_the_lattice():
    """What beam search optimisation (Wiseman and Rush 2016) needs: every kept hypothesis, scored with gradient."""
    model = transformer()
    source = [[5, 6, 7, 3], [8, 9, 3]]
    found = decode(model, source, BeamSearch(beam_size=3, max_length=6, keep_lattice=True))
    step = 2
    lattice = found.lattice
    prefixes = lattice.prefixes(step)
    assert prefixes.shape == (2, 3, step + 1)
    kept = lattice.scores[step] > -torch.inf
    inputs = torch.cat([torch.full_like(prefixes[..., :1], model.bos_id), prefixes[..., :-1]], 2)
    lengths = torch.tensor([4, 3])
    padded = torch.tensor([source[0], [*source[1], model.pad_id]])
    logits = model.force(inputs, model.encode(padded, lengths))
    sums = logits.log_softmax(-1).gather(-1, prefixes[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(sums[kept], lattice.scores[step][kept], rtol=1e-4, atol=1e-4)
    assert sums.requires_grad
