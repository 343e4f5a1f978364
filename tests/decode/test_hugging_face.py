"""`adapt` against `generate` of transformers, on small random models.

The two are defined to agree when: pad is suppressed in `generate` (we never generate pad or bos); no sentence reaches
the limit (`generate` returns what stands there without eos, we close it with eos), which an eos that becomes likelier
with every position ensures and the tests check; and the rules of stopping are paired, `early_stopping` True with
first, False with heuristic, "never" with exact: the first two ask whether num_beams hypotheses are finished, as ours
do, and "never" only goes on longer than exact does, after the best hypotheses are settled.
"""

from __future__ import annotations

import pytest
import torch
from hugging_face_helpers import V, generated, raise_eos, sources

from condgen_fast.decode import BeamSearch, Greedy, adapt, decode

transformers = pytest.importorskip("transformers")

SIZES = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    init_std=0.4,
)


def marian():
    config = transformers.MarianConfig(
        vocab_size=V, pad_token_id=V - 1, eos_token_id=0, decoder_start_token_id=V - 1, scale_embedding=True, **SIZES
    )
    model = transformers.MarianMTModel(config)
    model.final_logits_bias.normal_(std=0.5)
    return model


def bart():
    config = transformers.BartConfig(
        vocab_size=V,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **SIZES,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 0
    model.final_logits_bias.normal_(std=0.5)
    return model


def t5():
    config = transformers.T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    return model


@pytest.fixture(params=[marian, bart, t5], ids=lambda make: make.__name__)
def model(request):
    return made(request.param)


def made(make):
    torch.manual_seed(3)
    model = make().eval()
    model.register_forward_hook(raise_eos, with_kwargs=True)
    return model


def test_greedy_is_generates(model):
    tokens, lengths = sources(24, model.config.pad_token_id)
    expected, _ = generated(model, tokens, lengths, 1, num_beams=1)
    found = decode(adapt(model), tokens, "greedy", source_lengths=lengths, max_length=60)
    assert found.to_lists() == expected
    assert len({len(rows[0]) for rows in expected}) > 3


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize(("stopping", "early_stopping"), [("first", True), ("heuristic", False), ("exact", "never")])
def test_beam_is_generates(model, stopping, early_stopping, length_penalty):
    tokens, lengths = sources(12, model.config.pad_token_id, seed=1)
    n = 2
    expected, scores = generated(
        model, tokens, lengths, n, num_beams=4, early_stopping=early_stopping, length_penalty=length_penalty
    )
    beam = BeamSearch(beam_size=4, n_best=n, stopping=stopping, length_penalty=length_penalty, max_length=60)
    found = decode(adapt(model), tokens, beam, source_lengths=lengths)
    norm = (found.lengths + 1) ** length_penalty  # which would enlarge errors of the sums of log-probabilities
    torch.testing.assert_close(found.scores * norm, scores * norm, rtol=0, atol=1e-5)
    assert found.to_lists() == expected


def test_several_eos_ids(model):
    tokens, lengths = sources(12, model.config.pad_token_id, seed=4)
    one = decode(adapt(model), tokens, "greedy", source_lengths=lengths, max_length=60).to_lists()
    ordinary = [token for rows in one for token in rows[0] if token not in (0, 1, 2, V - 1)]
    other = max(set(ordinary), key=ordinary.count)
    model.generation_config.eos_token_id = [model.config.eos_token_id, other]
    adapted = adapt(model)
    assert adapted.eos_ids == [model.config.eos_token_id, other] and adapted.eos_id == model.config.eos_token_id
    for strategy, options in (
        (Greedy(max_length=60, min_length=3), {"num_beams": 1}),
        (BeamSearch(beam_size=4, n_best=2, stopping="first", max_length=60, min_length=3), {"num_beams": 4}),
    ):
        n = strategy.n_best if isinstance(strategy, BeamSearch) else 1
        expected, scores = generated(
            model, tokens, lengths, n, min_new_tokens=2, early_stopping=n > 1 or None, **options
        )
        found = decode(adapted, tokens, strategy, source_lengths=lengths)
        assert found.to_lists() == expected
        assert all(other not in row for rows in expected for row in rows)
        if scores is not None:
            torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
        else:
            assert expected != one
    for row in decode(adapted, tokens, "sample", n_samples=4, max_length=60, source_lengths=lengths).to_lists():
        assert all(other not in tokens for tokens in row)


def test_greedy_ends_at_the_limit_with_the_likelier_eos(model):
    model.generation_config.eos_token_id = [model.config.eos_token_id, 7, 9]
    found = decode(adapt(model), [[5, 6, 7], [8]], Greedy(max_length=1))
    beam = decode(adapt(model), [[5, 6, 7], [8]], BeamSearch(beam_size=1, stopping="first", max_length=1))
    torch.testing.assert_close(found.scores, beam.scores, rtol=0, atol=1e-6)


def test_forced_bos_and_its_override():
    model = made(bart)
    tokens, lengths = sources(6, 1)
    for forced in (None, 7):
        options = dict(forced_bos_token_id=forced) if forced is not None else {}
        expected, scores = generated(model, tokens, lengths, 1, num_beams=3, early_stopping=True, **options)
        beam = BeamSearch(beam_size=3, stopping="first", max_length=60)
        found = decode(adapt(model, forced_bos_id=forced), tokens, beam, source_lengths=lengths)
        assert found.to_lists() == expected
        assert all(rows[0][0] == (forced or 0) for rows in expected)
        assert (found.token_log_probs[:, 0, 0] == 0).all()


def test_any_batch_gives_the_same(model):
    tokens, lengths = sources(9, model.config.pad_token_id, seed=2)
    adapted = adapt(model)
    beam = BeamSearch(beam_size=3, n_best=3)
    whole = decode(adapted, tokens, beam, source_lengths=lengths)
    for i in range(9):
        alone = decode(adapted, tokens[i : i + 1, : int(lengths[i])], beam, source_lengths=lengths[i : i + 1])
        assert alone.to_lists()[0] == whole.to_lists()[i]
        torch.testing.assert_close(alone.scores[0], whole.scores[i], rtol=0, atol=1e-5)


def test_scores_are_those_of_teacher_forcing(model):
    tokens, lengths = sources(8, model.config.pad_token_id, seed=3)
    adapted = adapt(model)
    found = decode(adapted, tokens, BeamSearch(beam_size=4), source_lengths=lengths)
    for i in range(8):
        hypothesis = found.to_lists()[i][0] + [adapted.eos_id]
        source = tokens[i : i + 1, : int(lengths[i])]
        with torch.no_grad():
            inputs = torch.tensor([[adapted.bos_id] + hypothesis[:-1]])
            logits = model(input_ids=source, decoder_input_ids=inputs).logits[0]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(hypothesis)[:, None])[:, 0]
        if adapted.forced_bos_id is not None:
            expected[0] = 0.0
        torch.testing.assert_close(found.token_log_probs[i, 0, : len(hypothesis)], expected, rtol=0, atol=1e-4)


def test_only_the_self_attention_cache_is_reordered(model, monkeypatch):
    moved = []
    original = transformers.DynamicCache.reorder_cache
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda c, i: moved.append(c) or original(c, i))
    seen = []
    adapted = adapt(model)
    step = adapted.step
    monkeypatch.setattr(adapted, "step", lambda t, s: seen.append(s.cache) or step(t, s))
    decode(adapted, [[5, 6, 7]], BeamSearch(beam_size=2, min_length=5))
    cache = seen[-1]
    assert moved and all(c is cache.self_attention_cache for c in moved)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_source_is_cached_once_a_sentence(model, attention, monkeypatch):
    """Not once a beam, where torch's attention is the model's; hypotheses are those of a cache that is."""
    model.set_attn_implementation(attention)
    tokens, lengths = sources(9, model.config.pad_token_id, seed=5)
    beam = BeamSearch(beam_size=4, n_best=4, max_length=60)
    adapted, K = adapt(model), 4
    seen, step = [], adapted.step

    def spy(tokens, state):
        logits, state = step(tokens, state)
        seen.extend((len(tokens), layer.keys, layer.values) for layer in state.cache.cross_attention_cache.layers)
        return logits, state

    monkeypatch.setattr(adapted, "step", spy)
    found = decode(adapted, tokens, beam, source_lengths=lengths)
    rows = 1 if attention == "sdpa" else K
    assert len(seen) > 10 and all(len(keys) == len(values) == rows * B for B, keys, values in seen)
    assert len({B for B, _, _ in seen}) > 1  # finished sentences have left
    # read in place: the caches of a step are those of the step before until sentences leave
    moves = [a[1].data_ptr() != b[1].data_ptr() for a, b in zip(seen, seen[2:], strict=False) if a[0] == b[0]]
    assert not any(moves)

    monkeypatch.setattr(adapted, "_shares_source", lambda: False)
    copied = decode(adapted, tokens, beam, source_lengths=lengths)
    assert found.to_lists() == copied.to_lists()
    torch.testing.assert_close(found.scores, copied.scores, rtol=0, atol=1e-5)


def test_a_failing_step_leaves_the_model_as_it_was(model, monkeypatch):
    expected = decode(adapt(model), [[5, 6], [7]], BeamSearch(beam_size=2)).to_lists()
    broken = adapt(model)
    monkeypatch.setattr(broken, "reorder", lambda state, parents: 1 / 0)
    before = dict(vars(model.config))
    with pytest.raises(ZeroDivisionError):
        decode(broken, [[5, 6], [7]], BeamSearch(beam_size=2))
    assert vars(model.config) == before
    assert decode(adapt(model), [[5, 6], [7]], BeamSearch(beam_size=2)).to_lists() == expected


def test_training_mode_and_weights_are_left_alone(model):
    model.train()
    frozen = model.get_encoder().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decode(adapt(model), [[5, 6], [7]], BeamSearch(beam_size=2))
    assert model.training and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sources_the_model_cannot_read(model):
    known = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"source must be in \[0, {known}\); got {known}"):
        decode(adapt(model), [[5, known]], "greedy")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:  # T5's positions are relative
        with pytest.raises(ValueError, match=f"at most the model's {longest} positions; got {longest + 1} tokens"):
            decode(adapt(model), [[5] * (longest + 1)], "greedy")


def test_what_cannot_be_adapted():
    with pytest.raises(TypeError, match="encoder-decoder.*got Linear"):
        adapt(torch.nn.Linear(2, 2))
    model = marian()
    model.generation_config.eos_token_id = []
    with pytest.raises(ValueError, match=r"eos_token_id must be an id; got \[\]"):
        adapt(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [0, 5], [1, 2]
    with pytest.raises(ValueError, match=r"pad_token_id must be one id; got \[1, 2\]"):
        adapt(model)
    with pytest.raises(ValueError, match=r"forced_bos_id must be in \[0, 39\]; got 40"):
        adapt(bart(), forced_bos_id=40)
    with pytest.raises(TypeError, match="adapt"):
        decode(marian(), [[5]])
