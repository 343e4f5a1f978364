"""The left-to-right strategies on the reference Transformer: its caches, its padding, its teacher forcing."""

from __future__ import annotations

import pytest
import torch
from small_transformer import small_transformer, sources

from condgen_fast.decode import BeamSearch, Greedy, Sampling, decode

STRATEGIES = [
    BeamSearch(beam_size=4, n_best=4),
    BeamSearch(beam_size=3, stopping="first", normalization="gnmt", no_repeat_ngram=2),
    Greedy(),
    Sampling(seed=2, n_samples=3, top_p=0.9),
]


@pytest.fixture
def model():
    return small_transformer()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_any_batch_gives_the_same(model, strategy):
    source = sources(8)
    whole = decode(model, source, strategy)
    backwards = decode(model, source[::-1], strategy)
    assert backwards.to_lists() == whole.to_lists()[::-1]
    for i, sentence in enumerate(source):
        alone = decode(model, [sentence], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[i]
        torch.testing.assert_close(alone.scores[0], whole.scores[i], rtol=0, atol=1e-5)
        assert alone.iterations[0] == whole.iterations[i]
    assert len(set(whole.iterations.tolist())) > 3


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_log_probs_are_those_of_teacher_forcing(model, strategy):
    source = sources(6)
    found = decode(model, source, strategy)
    for i, sentence in enumerate(source):
        for j, tokens in enumerate(found.to_lists()[i]):
            target = torch.tensor([[model.bos_id, *tokens]])
            with torch.no_grad():
                hidden = model(torch.tensor([sentence]), torch.tensor([len(sentence)]), target)
            log_probs = model.project(hidden)[0].log_softmax(-1)
            expected = log_probs.gather(1, torch.tensor([*tokens, model.eos_id])[:, None])[:, 0]
            actual = found.token_log_probs[i, j, : len(tokens) + 1].double()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
