"""`compat`: the same hypotheses as the beam searches of Hugging Face, fairseq and CTranslate2 on the same logits."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers import TableModel, random_table

from condgen_fast.decode import BeamSearch, adapt, decode


def plain_fairseq(model, sentence, *, beam_size, max_length, min_length, length_penalty):
    """fairseq's SequenceGenerator (0.12) for one sentence, in its own words: `max_len` and `min_len` do not count eos.

    Candidates are the 2 * beam best; those of the beam best that are eos are finalized, in order, until beam are; the
    sentence is finished then, or at step max_len, where only eos is possible.
    """
    max_len, min_len = max_length - 1, max(min_length - 1, 0)
    beam, finalized, margin = [(0.0, [])], [], math.inf
    for step in range(max_len + 1):
        candidates = []
        for total, tokens in beam:
            node = 0
            for token in tokens:
                node = (node * model.vocab_size + token + 1) % model.table.shape[1]
            for token, log_prob in enumerate(model.table[sentence, node].double().log_softmax(0).tolist()):
                is_eos = token == model.eos_id
                if (
                    token in (model.pad_id, model.bos_id)
                    or (is_eos and step < min_len)
                    or (step == max_len and not is_eos)
                ):
                    continue
                candidates.append((total + log_prob, tokens, token))
        candidates = sorted(candidates, key=lambda c: -c[0])
        margin = min([margin, *(a[0] - b[0] for a, b in itertools.pairwise(candidates))])
        candidates = candidates[: 2 * beam_size]
        for total, tokens, token in candidates[:beam_size]:
            if token == model.eos_id and len(finalized) < beam_size:
                finalized.append((total / (step + 1) ** length_penalty, tokens))
        if len(finalized) == beam_size or step == max_len:
            break
        beam = [(t, [*tokens, token]) for t, tokens, token in candidates if token != model.eos_id][:beam_size]
    finalized.sort(key=lambda pair: -pair[0])
    margin = min([margin, *(a[0] - b[0] for a, b in itertools.pairwise(finalized))])
    return finalized, margin


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("min_length", [0, 4])
def test_fairseq(length_penalty, min_length):
    sentences = 150
    model = TableModel(random_table(sentences, 997, 7, seed=21, eos_bias=1.0))
    options = dict(beam_size=3, max_length=8, min_length=min_length, length_penalty=length_penalty)
    found = decode(model, [[s] for s in range(sentences)], BeamSearch(compat="fairseq", n_best=3, **options))
    ours = decode(model, [[s] for s in range(sentences)], BeamSearch(stopping="first", n_best=3, **options))
    compared = 0
    for s in range(sentences):
        expected, margin = plain_fairseq(model, s, **options)
        if margin > 1e-5:
            compared += 1
            assert found.to_lists()[s][: len(expected)] == [tokens for _, tokens in expected]
            assert found.scores[s, : len(expected)].tolist() == pytest.approx([v for v, _ in expected], abs=1e-5)
    assert compared > 100
    if length_penalty == 2.0 and min_length == 0:
        assert found.to_lists() != ours.to_lists()  # which keeps the best of those that end at once


@pytest.fixture(scope="module")
def marian():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=23,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=22,
        eos_token_id=0,
        decoder_start_token_id=22,
        forced_eos_token_id=None,
        init_std=0.9,
    )
    model = transformers.MarianMTModel(config).eval()
    model.generation_config.bad_words_ids = None
    model.final_logits_bias[0, 0] = 1.0  # eos, so that hypotheses of many lengths finish
    return model


STOPPING = {"first": True, "heuristic": False, "exact": "never"}


@pytest.mark.parametrize(
    "options",
    [
        dict(length_penalty=1.0),
        dict(length_penalty=2.0, n_best=3),
        dict(length_penalty=-1.0),
        dict(length_penalty=0.0, n_best=2),
        dict(min_length=5),
        dict(no_repeat_ngram=2),
        dict(repetition_penalty=1.3),
        dict(max_length=3, n_best=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("stopping", STOPPING)
def test_hugging_face(marian, stopping, options):
    options = dict(n_best=1, length_penalty=1.0, max_length=12, min_length=0) | options
    generator = torch.Generator().manual_seed(7)
    source = torch.randint(1, 22, (40, 6), generator=generator)
    source[:, -1] = 0
    found = decode(adapt(marian), source, BeamSearch(beam_size=4, compat="hf", stopping=stopping, **options))
    generated = marian.generate(
        source,
        attention_mask=torch.ones_like(source),
        num_beams=4,
        num_return_sequences=options["n_best"],
        do_sample=False,
        max_new_tokens=options["max_length"],
        min_new_tokens=max(options["min_length"] - 1, 0),
        length_penalty=options["length_penalty"],
        early_stopping=STOPPING[stopping],
        no_repeat_ngram_size=options.get("no_repeat_ngram", 0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = generated.sequences_scores.view(40, -1)
    same = 0
    for i, (row, of_row) in enumerate(
        zip(found.to_lists(), generated.sequences.view(40, scores.shape[1], -1).tolist(), strict=True)
    ):
        for ours, theirs in zip(row, of_row, strict=True):
            theirs = theirs[1:]  # the token that the decoder starts with
            theirs = theirs[: theirs.index(0)] if 0 in theirs else theirs
            while theirs and len(theirs) > len(ours) and theirs[-1] == 22:
                theirs = theirs[:-1]
            same += ours == theirs
        torch.testing.assert_close(found.scores[i], scores[i], rtol=1e-4, atol=1e-4)
    assert same == 40 * scores.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        dict(length_penalty=1.0),
        dict(length_penalty=0.0, n_best=2),
        dict(length_penalty=0.6, n_best=4, patience=2.0),
        dict(length_penalty=-1.0, n_best=4),
        dict(min_length=5),
        dict(no_repeat_ngram=1, n_best=4),
        dict(no_repeat_ngram=2, n_best=4),
        dict(repetition_penalty=1.3),
        dict(max_length=3, n_best=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("eos_bias", [1.0, 6.0])  # most are cut at the limit; most end
def test_ctranslate2(marian, options, eos_bias, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters.transformers import MarianMTLoader

    marian = copy.deepcopy(marian)
    marian.final_logits_bias[0, 0] = eos_bias
    pieces = ["</s>", "<unk>", *map(str, range(2, 22))]
    spec = MarianMTLoader().get_model_spec(marian)
    spec.register_source_vocabulary(pieces)
    spec.register_target_vocabulary(pieces)
    spec.config.add_source_eos, spec.config.decoder_start_token = False, "</s>"
    spec.validate()
    spec.save(str(tmp_path))
    translator = ctranslate2.Translator(str(tmp_path), device="cpu", compute_type="float32")
    generator = torch.Generator().manual_seed(7)
    source = torch.randint(2, 22, (40, 6), generator=generator)
    source[:, -1] = 0
    options = dict(n_best=1, length_penalty=1.0, max_length=12, min_length=0) | options
    found = decode(adapt(marian), source, BeamSearch(beam_size=4, compat="ctranslate2", banned=(22,), **options))
    results = translator.translate_batch(
        [[pieces[token] for token in row] for row in source.tolist()],
        beam_size=4,
        num_hypotheses=options["n_best"],
        length_penalty=options["length_penalty"],
        patience=options.get("patience", 1.0),
        max_decoding_length=options["max_length"],
        min_decoding_length=max(options["min_length"] - 1, 0),
        no_repeat_ngram_size=options.get("no_repeat_ngram", 0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        return_scores=True,
        disable_unk=False,
    )
    for row, scores, result in zip(found.to_lists(), found.scores.tolist(), results, strict=True):
        assert [[pieces[token] for token in tokens] for tokens in row] == result.hypotheses
        assert scores == pytest.approx(result.scores, abs=1e-3)
    if eos_bias == 6.0 and options["max_length"] > 3:
        assert (found.lengths < options["max_length"]).float().mean() > 0.5


def test_options_that_a_system_does_not_have():
    for options, message in (
        (dict(compat="marian"), "compat must be 'hf', 'fairseq' or 'ctranslate2'"),
        (dict(compat="fairseq", stopping="exact"), "stopping must be 'first'; got 'exact'"),
        (dict(compat="hf", normalization="gnmt"), "normalization must be power or none"),
    ):
        with pytest.raises(ValueError, match=message):
            BeamSearch(**options)
    assert [BeamSearch(compat=c).stopping_rule for c in (None, "hf", "fairseq", "ctranslate2")] == [
        "exact",
        "heuristic",
        "first",
        "first",
    ]
