"""Noisy parallel decoding: a teacher reorders what another strategy found."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from refinement_helpers import BOS, EOS, FIRST, MASK, PAD, RandomModel, ScriptedModel

from condgen_fast.decode import BeamSearch, Hypotheses, MaskPredict, Rescored, decode
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer

VOCAB = 17


def transformer(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(vocab_size=VOCAB, width=16, feed_forward=32, encoder_layers=1, decoder_layers=2, heads=2)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.eval()


def score_by_forward(model: Transformer, source: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens and eos, by one pass over the whole target."""
    with torch.no_grad():
        hidden = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[model.bos_id, *tokens]]))
        return model.project(hidden)[0].log_softmax(-1).gather(1, torch.tensor([[*tokens, model.eos_id]]).T)[:, 0]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 0.6])
def test_scores_and_order_are_the_teacher_s(length_penalty):
    model, teacher, source = RandomModel(VOCAB), transformer(), [[5, 6], [7, 8, 9, 10], [11]]
    inner = MaskPredict(length_beam=4, n_best=4)
    candidates = decode(model, source, inner)
    got = decode(model, source, Rescored(inner, teacher, n_best=4, length_penalty=length_penalty))
    for b, sentence in enumerate(source):
        scored = []
        for tokens in candidates.to_lists()[b]:
            log_probs = score_by_forward(teacher, sentence, tokens)
            scored.append((float(log_probs.sum()) / (len(tokens) + 1) ** length_penalty, tokens, log_probs))
        scored.sort(key=lambda each: -each[0])
        assert got.to_lists()[b] == [tokens for _, tokens, _ in scored]
        torch.testing.assert_close(got.scores[b], torch.tensor([score for score, _, _ in scored]))
        for k, (_, tokens, log_probs) in enumerate(scored):
            torch.testing.assert_close(got.token_log_probs[b, k, : len(tokens) + 1], log_probs, rtol=1e-4, atol=1e-5)
            assert (got.token_log_probs[b, k, len(tokens) + 1 :] == 0).all()
    best = decode(model, source, Rescored(inner, teacher, length_penalty=length_penalty))
    assert [rows[0] for rows in best.to_lists()] == [rows[0] for rows in got.to_lists()]
    assert torch.equal(best.iterations, candidates.iterations)


def test_beam_search_rescored_by_its_own_model_keeps_its_order():
    model, source = transformer(), [[5, 6, 7], [8, 9]]
    beam = decode(model, source, BeamSearch(beam_size=3, n_best=3, max_length=12))
    again = decode(model, source, Rescored(BeamSearch(beam_size=3, n_best=3, max_length=12), model, n_best=3))
    assert again.to_lists() == beam.to_lists()
    torch.testing.assert_close(again.scores, beam.scores)
    torch.testing.assert_close(again.token_log_probs, beam.token_log_probs)


def test_candidates_that_were_cut_are_scored_without_eos():
    model, source = transformer(), [[5, 6, 7], [8, 9]]
    inner = BeamSearch(beam_size=4, n_best=4, max_length=3, compat="hf", banned=(model.pad_id, model.bos_id))
    beam = decode(model, source, inner)
    assert beam.ended.any() and not beam.ended.all()
    again = decode(model, source, Rescored(inner, model, n_best=4))
    assert again.to_lists() == beam.to_lists() and torch.equal(again.ended, beam.ended)
    torch.testing.assert_close(again.scores, beam.scores)


def test_what_is_no_candidate_stays_last_and_a_teacher_in_training_mode_comes_back():
    model = ScriptedModel(VOCAB, fill=lambda s, c: [(FIRST, 0.5)] * len(c), lengths=lambda s: {2: 1.0})
    teacher = transformer().train()
    result = decode(model, [[5]], Rescored(MaskPredict(length_beam=3, n_best=3), teacher, n_best=3))
    assert result.lengths.tolist() == [[2, 0, 0]] and teacher.training
    assert result.scores[0, 1:].tolist() == [-math.inf, -math.inf] and (result.token_log_probs[0, 1:] == 0).all()
    assert decode(model, [], Rescored(MaskPredict(n_best=2), teacher, n_best=2)).tokens.shape == (0, 2, 0)
    assert not {PAD, BOS, EOS, MASK} & set(result.to_lists()[0][0])


def test_a_hypothesis_of_score_minus_infinity_is_rescored_too():
    """Places that stand for none come behind it, in whatever order they are handed over."""
    minus_infinity = -math.inf

    class Found:
        n_best = 4

        def run(self, model, source, source_lengths):
            lengths = torch.tensor([[0, 2, 0, 1]])
            return Hypotheses(
                tokens=torch.tensor([[[PAD, PAD], [5, 6], [PAD, PAD], [7, PAD]]]),
                lengths=lengths,
                scores=torch.tensor([[minus_infinity, -1.0, minus_infinity, minus_infinity]]),
                token_log_probs=torch.zeros(1, 4, 3),
                iterations=torch.ones(1, dtype=torch.int64),
            )

    teacher = transformer()
    result = decode(RandomModel(VOCAB), [[5]], Rescored(Found(), teacher, n_best=4))
    expected = sorted((score_by_forward(teacher, [5], tokens).mean().item(), tokens) for tokens in ([5, 6], [7]))[::-1]
    assert result.to_lists()[0] == [tokens for _, tokens in expected] + [[], []]
    assert result.scores[0, :2].tolist() == pytest.approx([score for score, _ in expected])
    assert result.scores[0, 2:].tolist() == [minus_infinity] * 2


@pytest.mark.parametrize("inner", [BeamSearch(beam_size=3, n_best=3, max_length=9), MaskPredict(n_best=3)])
def test_a_trace_is_that_of_the_strategy(inner):
    model = transformer() if isinstance(inner, BeamSearch) else RandomModel(VOCAB)
    teacher, source, traced = transformer(1), [[5, 6, 7], [8, 9]], replace(inner, trace=True)
    assert decode(model, source, Rescored(inner, teacher)).trace is None
    result = decode(model, source, Rescored(traced, teacher))
    assert result.trace == decode(model, source, traced).trace and len(result.trace) == 2


def test_refusals():
    teacher, inner = transformer(), MaskPredict(n_best=3)
    cases = [
        (lambda: Rescored(MaskPredict, teacher), TypeError, "strategy must be one such as"),
        (lambda: Rescored("beam", teacher), TypeError, "strategy must be one such as"),
        (lambda: Rescored(inner, RandomModel()), TypeError, "teacher must be a StepModel; RandomModel has no start"),
        (lambda: Rescored(inner, teacher, n_best=4), ValueError, r"n_best must be in \[1, 3\]; got 4"),
        (lambda: Rescored(inner, teacher, length_penalty=-1.0), ValueError, "length_penalty must be >= 0.0; got -1.0"),
        (lambda: decode(teacher, [[5]], Rescored(inner, teacher)), TypeError, "MaskPredict|FillModel"),
        (
            lambda: decode(RandomModel(VOCAB + 1), [[5]], Rescored(inner, teacher)),
            ValueError,
            "teacher must have the model's vocab_size, 18; got 17",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
