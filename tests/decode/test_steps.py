"""Greedy search, sampling and beam search over steps that are made in place: on a GPU, and forced here."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import Launches, fake_gpu
from replayed import left_behind, replayed
from small_transformer import small_transformer, sources

from condgen_fast.decode import BeamSearch, Greedy, Sampling, Trie, beam_search, decode, left_to_right
from condgen_fast.decode.steps import Steps
from condgen_fast.models import compiled
from condgen_fast.models.reserved import ReservedState
from condgen_fast.ops.transformer import attention

STRATEGIES = [
    Greedy(),
    Greedy(min_length=4, length_penalty=0.5),
    Sampling(seed=2, n_samples=3, top_p=0.9),
    BeamSearch(beam_size=4, n_best=4),
    BeamSearch(beam_size=1, stopping="first"),
    BeamSearch(beam_size=3, no_repeat_ngram=2, repetition_penalty=1.2),
    BeamSearch(beam_size=4, groups=2),
]

OTHERS = [
    *[BeamSearch(beam_size=4, compat=name) for name in ("hf", "fairseq", "ctranslate2")],
    *[BeamSearch(beam_size=4, stopping=rule) for rule in ("heuristic", "first")],
    BeamSearch(beam_size=4, stopping="first", patience=2.0, n_best=3),
    BeamSearch(beam_size=4, choose="sample", seed=1),
    BeamSearch(beam_size=4, choose="stochastic", seed=1, n_best=4),
    BeamSearch(beam_size=4, groups=4, diversity=1.0, n_best=4),
    BeamSearch(beam_size=4, min_length=5, max_length=20),
    BeamSearch(beam_size=3, prefixes=[[5, 6], *[[]] * 7, *[[7]] * 8]),
    BeamSearch(beam_size=3, trie=Trie([[5, 6, 7], [8, 9], [10], [5, 8, 11, 12]])),
    BeamSearch(beam_size=3, repetition_penalty=1.3, compat="hf"),
    BeamSearch(beam_size=3, repetition_penalty=1.3, no_repeat_ngram=3, compat="ctranslate2"),
    BeamSearch(beam_size=4, normalization="gnmt", length_penalty=0.6),
    BeamSearch(beam_size=4, length_penalty=-1.0),
    BeamSearch(beam_size=8, banned=[6, 7], n_best=8, keep_lattice=True),
    Sampling(n_samples=4, seed=1, top_k=5, temperature=0.7),
]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(compiled, "stands_in", lambda *modules: False)
    return small_transformer()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_replayed_steps_find_the_same(model, strategy, monkeypatch):
    """Every call of the captured piece but two of each shape is a replay, in which no Python of it runs."""
    source = sources(16)
    expected = decode(model, source, strategy)
    rows, step = [], ReservedState.step
    monkeypatch.setattr(ReservedState, "step", lambda *a: rows.append(len(a[2])) or step(*a))
    with replayed(monkeypatch, left_to_right, beam_search) as recordings:
        found = decode(model, source, strategy)
    assert found.to_lists() == expected.to_lists()
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)
    assert len(recordings) > 1 and rows[0] == 16 and rows[-1] < 16  # sentences have left, others been captured anew
    assert len(rows) <= 2 * len(recordings) + 1 < int(expected.iterations.max())


@pytest.mark.parametrize(
    "strategy", [Greedy(), Sampling(seed=1), BeamSearch(beam_size=2)], ids=lambda s: type(s).__name__
)
def test_no_graph_outlives_its_call(model, strategy, monkeypatch):
    assert not left_behind(lambda: decode(model, sources(16), strategy), monkeypatch, left_to_right, beam_search)


@pytest.mark.parametrize("strategy", OTHERS, ids=str)
def test_every_option_is_replayed(model, strategy, monkeypatch):
    expected = decode(model, sources(16), strategy)
    with replayed(monkeypatch, left_to_right, beam_search) as recordings:
        found = decode(model, sources(16), strategy)
    assert recordings and found.to_lists() == expected.to_lists()
    for name in ("scores", "token_log_probs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
    assert torch.equal(found.iterations, expected.iterations)


def test_hooks_run_at_every_step(model, monkeypatch):
    source, calls = sources(4), []
    expected = decode(model, source, "beam")
    handle = model.decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with replayed(monkeypatch, beam_search, left_to_right) as recordings:
        for strategy in ("beam", "greedy"):
            decode(model, source, strategy)
        assert decode(model, source, "beam").to_lists() == expected.to_lists()
    handle.remove()
    assert not recordings


@pytest.mark.parametrize("strategy", [Greedy(max_length=9), BeamSearch(beam_size=2, max_length=7)], ids=str)
def test_replayed_kernels_find_the_same(model, strategy, monkeypatch):
    """The Triton kernels, interpreted, in a whole search."""
    model, source = model.float(), sources(3)
    expected = decode(model, source, strategy)
    monkeypatch.setattr(attention, "_plain", lambda impl, query: False)
    with replayed(monkeypatch, left_to_right, beam_search) as recordings:
        found = decode(model, source, strategy)
    assert found.to_lists() == expected.to_lists()
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert any("target_attention" in str(call[0]) for call in recordings[0].calls)


@torch.no_grad()
def test_a_step_of_greedy_search_on_a_gpu_waits_for_nothing(model, monkeypatch):
    with fake_gpu(monkeypatch) as device:
        model = model.float().to(device)
        source = torch.zeros(4, 7, dtype=torch.int64, device=device)
        memory = model.encode(source, torch.zeros(4, dtype=torch.int64, device=device))
        steps = Steps(model, model.start(memory, 1), 9, device, in_place=True)
        tokens = torch.zeros(4, 1, dtype=torch.int64, device=device)
        assert steps(tokens).shape == (4, 1, 29)
        with Launches() as launches:
            steps(tokens)
        assert launches.counts["copy_"] == 1 and launches.counts["target_attention"] == 2
        steps.select(torch.zeros(2, dtype=torch.int64, device=device))
        assert steps(tokens[:2]).shape == (2, 1, 29)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_gpu_finds_what_the_cpu_finds(model, strategy):
    """In double precision, which the reference attends in, and captured."""
    source = sources(16)
    expected = decode(model, source, strategy)
    found = decode(model.cuda(), source, strategy)
    assert found.to_lists() == expected.to_lists()
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_captured_is_uncaptured(model, strategy, dtype, monkeypatch):
    model = model.to("cuda", dtype)
    source = sources(16)
    found = decode(model, source, strategy)
    monkeypatch.setattr("condgen_fast.decode.captured.Captured.__call__", lambda self: self._function())
    expected = decode(model, source, strategy)
    assert found.to_lists() == expected.to_lists() and torch.equal(found.scores, expected.scores)
