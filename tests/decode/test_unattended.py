"""Refinement as a GPU runs it: the same results from a fixed canvas, nothing that waits, and how much is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import Apart, Launches, fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import FIRST, PAD, Lagging, RandomModel, SharedStates
from small_refiners import model_of, same, sources

from condgen_fast.decode import (
    IterativeRefinement,
    LevenshteinRefinement,
    MaskPredict,
    decode,
    iterative_refinement,
    levenshtein,
    mask_predict,
)
from condgen_fast.decode.edits import Sentences
from condgen_fast.decode.unattended import Running

SHAPES = [{}, {"deletion_layers": 1, "insertion_layers": 1}, {"insertion_layers": 1}, {"share_decoder": False}]


@pytest.fixture
def unattended():
    """Turns the loops of a GPU on and off; off at the end. `leaving`: who has finished leaves at every chance."""
    with pytest.MonkeyPatch.context() as patch:

        def turn(on: bool, leaving: bool = False) -> None:
            patch.undo()
            if on:
                patch.setattr(levenshtein, "host_follows", lambda device: False)
                patch.setattr(mask_predict, "_captured", lambda *_: True)
                patch.setattr(iterative_refinement, "Running", Lagging)
                for module in (levenshtein, iterative_refinement):
                    patch.setattr(module, "worth_capturing_anew", lambda left, rows, *_: leaving and left < rows)

        yield turn


sentences = st.lists(st.lists(st.integers(FIRST, 90), min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", [RandomModel, SharedStates])
@settings(max_examples=40, deadline=None)
@given(sentences, st.integers(1, 6), st.integers(0, 9), st.sampled_from([None, 3, 8]), st.booleans(), st.data())
def test_levenshtein_on_a_fixed_canvas_gives_the_same(kind, rows, maximum, seed, max_length, leaving, data):
    given_tokens = None
    if data.draw(st.booleans()):
        given_tokens = [data.draw(st.lists(st.integers(FIRST, 16), max_size=7)) for _ in rows]
    penalty = data.draw(st.sampled_from([0.0, 0.5]))
    strategy = LevenshteinRefinement(maximum, eos_penalty=penalty, initial=given_tokens, max_length=max_length)
    model = kind(seed=seed)
    plain = decode(model, rows, strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levenshtein, "host_follows", lambda device: False)
        patch.setattr(levenshtein, "worth_capturing_anew", lambda left, rows, *_: leaving and left < rows)
        same(decode(model, rows, strategy), plain)


@settings(max_examples=30, deadline=None)
@given(
    rows=sentences,
    maximum=st.integers(1, 8),
    window=st.integers(2, 4),
    distance=st.sampled_from(["hamming", "jaccard"]),
    tolerance=st.sampled_from([0.0, 0.5, 1.0]),
    leaving=st.booleans(),
    seed=st.integers(0, 9),
)
def test_iterative_refinement_one_round_ahead_of_the_host_gives_the_same(
    rows, maximum, window, distance, tolerance, leaving, seed
):
    model = RandomModel(seed=seed)
    strategy = IterativeRefinement(maximum, window, distance, tolerance)
    plain = decode(model, rows, strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iterative_refinement, "Running", Lagging)
        patch.setattr(iterative_refinement, "worth_capturing_anew", lambda left, rows, *_: leaving and left < rows)
        same(decode(model, rows, strategy), plain)


@settings(max_examples=30, deadline=None)
@given(sentences, st.integers(1, 7), st.integers(1, 4), st.integers(0, 1), st.integers(0, 9))
def test_mask_predict_on_a_fixed_canvas_gives_the_same(rows, iterations, beam, least, seed):
    model, strategy = RandomModel(seed=seed), MaskPredict(iterations, beam, min_remasked=least, n_best=beam)
    plain = decode(model, rows, strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_predict, "_captured", lambda *_: True)
        same(decode(model, rows, strategy), plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_model_gives_the_same_bits(shape, unattended):
    strategy = LevenshteinRefinement(max_iterations=6)
    model = model_of("LevT", **shape)
    plain = decode(model, sources(), strategy)
    assert len(set(plain.iterations.tolist())) > 1 or shape == SHAPES[-1]
    for leaving in (False, True):
        unattended(True, leaving)
        same(decode(model, sources(), strategy), plain)


@pytest.mark.parametrize("strategy", [MaskPredict(5, 3), IterativeRefinement(8)])
def test_the_cmlm_gives_the_same_bits(strategy, unattended):
    model = model_of("CMLM")
    plain = decode(model, sources(), strategy)
    unattended(True)
    same(decode(model, sources(), strategy), plain)


def test_passes_are_made_on_the_same_memory_until_many_have_left(unattended):
    """The canvas stays, whoever has finished."""

    class Model(RandomModel):
        """Grows by one token an iteration, for as many iterations as the sentence's number says."""

        selected = 0

        def insert_logits(self, tokens, memory):
            logits = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, 4)
            logits[:, 0, 1] = torch.where(memory + 2 > (tokens != PAD).sum(1), 1.0, -1.0)
            return logits

        def delete_logits(self, tokens, memory):
            return torch.zeros(*tokens.shape, 2)

        def select(self, memory, rows):
            Model.selected += 1
            return super().select(memory, rows)

    unattended(True)
    rows = [[n] for n in range(3, 9)]
    result = decode(Model(), rows, LevenshteinRefinement(max_iterations=20, max_length=40))
    assert result.iterations.tolist() == [n + 1 for n in range(3, 9)] and Model.selected == 0


# What follows runs on device "meta", where whoever would wait raises.


def on_meta(kind: str, **options: Any) -> Any:
    return model_of(kind, **options).to("meta")


class Unread(Running):
    """Says that all are running, or what `flags` says, without looking."""

    def ask(self, running):
        self._shape = running.shape

    def read(self):
        return [True] * self._shape[0]

    def one_behind(self, running):
        self.ask(running)
        return self.read()


R, W = 3, 11


def encoded(model: Any, device: torch.device) -> Any:
    source = torch.empty(R, 6, dtype=torch.int64, device=device)
    return model.encode(source, source.new_empty(R))


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_no_iteration_of_levenshtein_refinement_waits(shape, monkeypatch):
    monkeypatch.setattr(levenshtein, "Running", Unread)
    launches = []
    with fake_gpu(monkeypatch) as device:
        model = on_meta("LevT", **shape)
        for maximum in (2, 5):
            now = Sentences.start(
                encoded(model, device),
                torch.empty(R, 2, dtype=torch.int64, device=device),
                torch.empty(R, dtype=torch.int64, device=device),
                model.pad_id,
            )
            strategy = LevenshteinRefinement(max_iterations=maximum)
            with Launches() as count:
                results = strategy._refine_unattended(Apart(model), now, W)
            launches.append(count.counts.total())
            assert results.tokens.shape == (R, W) and results.tokens.device == device
    assert (launches[1] - launches[0]) / 3 <= 25, launches


@torch.no_grad()
def test_no_round_of_mask_predict_waits(monkeypatch):
    with fake_gpu(monkeypatch) as device:
        model = on_meta("CMLM")
        memory = encoded(model, device)
        assert MaskPredict()._candidate_lengths(model, memory)[0].shape == (R, 5)
        ids = torch.empty(R, W, dtype=torch.int64, device=device)
        counts, t = torch.empty(5, R, dtype=torch.int64, device=device), ids.new_empty(1)
        now = mask_predict._InPlace(memory, ids, torch.empty(R, W, device=device), ids != 0, counts, t)
        with Launches() as count:
            mask_predict._round(Apart(model), now)
        assert count.counts.total() <= 10
        # projecting masked positions alone: the host knows the counts
        schedule = [[7, 5, 3], [4, 3, 2], [2, 1, 0], [0, 0, 0]]
        MaskPredict(4)._refine(model, memory, ids, now.log_probs, now.maskable, schedule, counts, None)


@torch.no_grad()
@pytest.mark.parametrize("distance", ["hamming", "jaccard"])
def test_no_round_of_iterative_refinement_waits(distance, monkeypatch):
    with fake_gpu(monkeypatch) as device:
        model = on_meta("CMLM")
        ids = torch.empty(R, W, dtype=torch.int64, device=device)
        now = iterative_refinement._Sentences(
            memory=encoded(model, device),
            rows=ids[:, 0].clone(),
            inside=ids != 0,
            running=ids[:, 0] != 0,
            rounds=ids[:, 0].clone(),
            tokens=ids,
            log_probs=torch.empty(R, W, device=device),
            outputs=ids.new_empty(R, 2, W),
        )
        where = ids.new_empty(R * (W - 2))
        strategy = IterativeRefinement(distance=distance)
        with Launches() as count:
            strategy._round(Apart(model), now, where)
        assert count.counts.total() <= (26 if distance == "hamming" else 40)


# On a GPU itself.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("LevT", LevenshteinRefinement(max_iterations=7)),
        ("LevT", LevenshteinRefinement(max_iterations=7, initial=[[7, 8, 9, 10, 5]] * 7, eos_penalty=0.5)),
        ("CMLM", MaskPredict(6, 3)),
        ("CMLM", IterativeRefinement(9)),
    ],
)
@pytest.mark.parametrize("leaving", [False, True])
def test_captured_equals_not_captured_equals_the_cpu(kind, strategy, leaving, monkeypatch):
    model = model_of(kind)
    expected = decode(model, sources(), strategy)
    if leaving:
        for module in (levenshtein, iterative_refinement):
            monkeypatch.setattr(module, "worth_capturing_anew", lambda left, rows, *_: left < rows)
    model = model.cuda()
    captured = decode(model, sources(), strategy)
    monkeypatch.setattr(type(model), "capturable", False)
    monkeypatch.setattr(mask_predict, "_captured", lambda *_: True)  # the same rounds, as they are
    plain = decode(model, sources(), strategy)
    for result in (captured, plain):
        assert result.to_lists() == expected.to_lists()
        assert result.iterations.tolist() == expected.iterations.tolist()
        torch.testing.assert_close(result.token_log_probs.cpu(), expected.token_log_probs, rtol=1e-4, atol=1e-4)
    assert torch.equal(captured.token_log_probs, plain.token_log_probs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["LevT", "CMLM"])
def test_iterations_make_no_synchronising_call_on_a_gpu(kind):
    model = model_of(kind).cuda()
    torch.cuda.synchronize()

    def waits(iterations: int) -> int:
        strategy = (LevenshteinRefinement if kind == "LevT" else MaskPredict)(iterations)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns() as seen:
                decode(model, sources(), strategy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(warning.message) for warning in seen)

    assert waits(3) == waits(8)
