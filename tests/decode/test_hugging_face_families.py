"""`adapt` on encoder-decoders built otherwise: experts, grouped, windowed and merged attention, no SDPA."""

from __future__ import annotations

import pytest
import torch
from hugging_face_helpers import V, generated, raise_eos, sources

from condgen_fast.decode import BeamSearch, adapt, decode, score

transformers = pytest.importorskip("transformers")

IDS = dict(vocab_size=V, pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=1)
HALF = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
WIDTHS = dict(encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)
LAYERS = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
GEMMA = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=5,
    max_position_embeddings=64,
    initializer_range=0.4,
)


def t5gemma():
    part = transformers.T5GemmaModuleConfig(**GEMMA)
    config = transformers.T5GemmaConfig(encoder=part, decoder=part.to_dict(), **IDS)
    return transformers.T5GemmaForConditionalGeneration(config)


def t5gemma2():
    text = dict(GEMMA)
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    images = dict(mm_tokens_per_image=1, boi_token_index=V - 3, eoi_token_index=V - 2, image_token_index=V - 1)
    encoder = dict(text_config=text, vision_config=vision, **images)
    config = transformers.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=V - 1, **IDS)
    model = transformers.T5Gemma2ForConditionalGeneration(config)
    for name, value in IDS.items():
        setattr(model.generation_config, name, value)
        setattr(model.config, name, value)
    return model


def fsmt():
    config = transformers.FSMTConfig(
        src_vocab_size=V,
        tgt_vocab_size=V,
        langs=["en", "de"],
        d_model=16,
        init_std=0.4,
        forced_eos_token_id=None,
        **HALF,
        **WIDTHS,
        **{name: value for name, value in IDS.items() if name != "vocab_size"},
    )
    return transformers.FSMTForConditionalGeneration(config)


def nllb_moe():
    config = transformers.NllbMoeConfig(
        d_model=16, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, init_std=0.4, **HALF, **WIDTHS, **IDS
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def switch_transformers():
    config = transformers.SwitchTransformersConfig(num_experts=4, **LAYERS, **IDS)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    return model


def prophetnet():
    config = transformers.ProphetNetConfig(
        hidden_size=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        init_std=0.4,
        **WIDTHS,
        **IDS,
    )
    return transformers.ProphetNetForConditionalGeneration(config)


@pytest.fixture(
    params=[t5gemma, t5gemma2, nllb_moe, switch_transformers, prophetnet, fsmt], ids=lambda make: make.__name__
)
def model(request):
    torch.manual_seed(3)
    model = request.param().eval()
    model.register_forward_hook(raise_eos, with_kwargs=True)
    return model


@pytest.mark.parametrize("beams", [1, 4])
def test_hypotheses_are_those_of_generate(model, beams):
    tokens, lengths = sources(16, model.config.pad_token_id, seed=1)
    options = dict(num_beams=beams) if beams == 1 else dict(num_beams=beams, early_stopping=True)
    expected, scores = generated(model, tokens, lengths, min(beams, 2), **options)
    strategy = BeamSearch(beam_size=beams, n_best=min(beams, 2), stopping="first", max_length=60)
    found = decode(adapt(model), tokens, strategy, source_lengths=lengths)
    assert found.to_lists() == expected
    if scores is not None:
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
    assert len({len(row) for rows in expected for row in rows}) > 3


def test_any_batch_gives_the_same(model):
    tokens, lengths = sources(7, model.config.pad_token_id, seed=2)
    adapted = adapt(model)
    beam = BeamSearch(beam_size=3, n_best=3, max_length=60)
    whole = decode(adapted, tokens, beam, source_lengths=lengths)
    for i in range(7):
        alone = decode(adapted, tokens[i : i + 1, : int(lengths[i])], beam)
        assert alone.to_lists()[0] == whole.to_lists()[i]
        torch.testing.assert_close(alone.scores[0], whole.scores[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make", [t5gemma, t5gemma2, nllb_moe, switch_transformers, fsmt], ids=lambda make: make.__name__
)
def test_score_is_that_of_decoding(make):
    """ProphetNet is not here: in transformers its logits with a cache are not those without (5.23)."""
    torch.manual_seed(4)
    adapted, source = adapt(make().eval()), [[5, 6, 7], [8, 9]]
    found = decode(adapted, source, "beam", beam_size=2, max_length=6)
    again = score(adapted, source, found)
    torch.testing.assert_close(again.detach(), found.token_log_probs, rtol=0, atol=1e-4)
    again.sum().backward()


def test_a_prophetnet_is_scored():
    adapted, source = adapt(prophetnet().eval()), [[5, 6, 7], [8, 9]]
    assert score(adapted, source, decode(adapted, source, "greedy", max_length=4)).isfinite().all()
