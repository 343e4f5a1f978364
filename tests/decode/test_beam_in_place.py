"""Beam search on a GPU that is not there: nothing waits, few launches, and steps in place find what others find."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import Launches, fake_gpu
from helpers import ShrinkingTableModel, TableModel, random_table
from refinement_helpers import HostReads
from replayed import replayed

from condgen_fast.decode import BeamSearch, Hypotheses, Trie, beam_search, decode, finished

SEQUENCES = [[2, 3], [2, 3, 4, 5], [6], [7, 8, 9], [4, 4, 4, 4, 4, 4]]
CONSTRAINED = [
    dict(min_length=4, banned=(3,)),
    dict(no_repeat_ngram=2),
    dict(repetition_penalty=1.5),
    dict(prefixes=True),
    dict(trie=SEQUENCES, prefixes=True),
    dict(compat="hf", n_best=2, no_repeat_ngram=1, repetition_penalty=1.2),
    dict(compat="ctranslate2", length_penalty=0.0, n_best=2, min_length=3, repetition_penalty=1.2),
]
VARIED = [
    dict(groups=2, n_best=4),
    dict(choose="stochastic", n_best=3, seed=1),
    dict(choose="sample", seed=1),
]


def strategy(options, batch):
    """A list of sequences becomes a trie; prefixes: every third sentence has one of two tokens."""
    options = dict(beam_size=4, max_length=12) | options
    if "trie" in options:
        options["trie"] = Trie(options["trie"], whole=False)
    if "prefixes" in options:
        options["prefixes"] = [[5, 6] if i % 3 == 0 else [] for i in range(batch)]
    return BeamSearch(**options)


class InPlace(ShrinkingTableModel):
    """Its state is in place once it is reserved."""

    reserved: int | None = None

    def reserve(self, state, steps):
        self.reserved = steps
        memory, nodes = state
        assert nodes is None
        return memory, torch.full((memory.shape[0], self.beams), -1, device=memory.device)

    def start(self, memory, beam_size):
        self.beams = beam_size
        return super().start(memory, beam_size)

    def step(self, tokens, state):
        if state[1] is None or self.reserved is None:
            return super().step(tokens, state)
        sentences, nodes = state
        nodes.copy_(torch.where(nodes < 0, 0, (nodes * self.vocab_size + tokens + 1) % self.table.shape[1]))
        return self.table[sentences[:, None], nodes], state

    def reorder(self, state, parents):
        if self.reserved is None:
            return super().reorder(state, parents)
        state[1].copy_(state[1].gather(1, parents))
        return state


@pytest.mark.parametrize("eos_bias", [1.5, -3.0])  # many leave; most reach the limit
@pytest.mark.parametrize("options", [dict(), dict(stopping="heuristic", n_best=3), *CONSTRAINED, *VARIED], ids=str)
def test_replayed_steps_find_the_same(options, eos_bias, monkeypatch):
    sentences = 24
    model = InPlace(random_table(sentences, 997, 12, seed=61, eos_bias=eos_bias))
    beam = strategy(options, sentences)
    source = [[s] for s in range(sentences)]
    expected = decode(model, source, beam)
    assert model.reserved is None
    with replayed(monkeypatch, beam_search) as recordings:
        found = decode(model, source, beam)
    assert model.reserved == 12 and recordings
    assert found.to_lists() == expected.to_lists() and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.token_log_probs, expected.token_log_probs)
    assert torch.equal(found.iterations, expected.iterations)
    if eos_bias > 0 and not options:
        assert len(recordings) > 1


def test_the_lattice_ends_with_the_last_sentence(monkeypatch):
    """However late the host learns of that."""
    model = InPlace(random_table(6, 997, 12, seed=61, eos_bias=4.0))
    beam, source = BeamSearch(beam_size=2, max_length=12, keep_lattice=True), [[s] for s in range(6)]
    expected = decode(model, source, beam)
    monkeypatch.setattr(beam_search, "STEPS_IN_PLACE", 7)
    with replayed(monkeypatch, beam_search):
        found = decode(model, source, beam)
    assert len(found.lattice.tokens) == found.iterations.max() not in (7, 12)
    for name in ("tokens", "parents", "scores", "ranks"):
        assert torch.equal(getattr(found.lattice, name), getattr(expected.lattice, name))


def test_a_model_that_has_to_go_on_step_by_step_does(monkeypatch):
    model = InPlace(random_table(6, 997, 12, seed=62, eos_bias=1.0))
    expected = decode(model, [[s] for s in range(6)], "beam")
    with replayed(monkeypatch, beam_search) as recordings:
        slow = decode(model, [[s] for s in range(6)], BeamSearch(impl="reference"))
        assert model.reserved is None  # the reference waits
        model.reserve = lambda state, steps: None
        found = decode(model, [[s] for s in range(6)], "beam")
    assert not recordings and found.to_lists() == slow.to_lists() == expected.to_lists()


class NoWork:
    """A model on the device that launches nothing itself."""

    vocab_size, pad_id, bos_id, eos_id = 50, 0, 0, 1

    def __init__(self, batch, beams, device):
        self.device, self.logits = device, torch.empty(batch, beams, self.vocab_size, device=device)

    def encode(self, source, source_lengths):
        return None

    def start(self, memory, beam_size):
        return None

    def step(self, tokens, state):
        return self.logits, state

    def reorder(self, state, parents):
        return state


class InPlaceNoWork(NoWork):
    def reserve(self, state, steps):
        return "in place"

    def select(self, state, rows):
        return state


def launches(cls, options, steps, monkeypatch):
    """Of a whole search but for its answer, by name; whatever waits for the device raises."""
    B = 6
    asked = []
    with fake_gpu(monkeypatch) as device, monkeypatch.context() as patch, Launches() as counted:
        patch.setattr(beam_search, "hypotheses_of", lambda *_: Hypotheses.empty(1))
        patch.setattr(beam_search, "may_capture", lambda device: True)
        patch.setattr(beam_search.Unfinished, "count", lambda self, ask: asked.append(ask))
        source = torch.ones(B, 3, dtype=torch.int64, device=device)
        lengths = torch.full((B,), 3, device=device)
        with torch.no_grad():
            strategy(options, B).run(cls(B, 4, device), source, lengths)
    assert len(asked) == steps
    return counted.counts


@pytest.mark.parametrize("cls", [NoWork, InPlaceNoWork])
def test_three_launches_a_step(cls, monkeypatch):
    """beam_topk is two; limits and a minimum length cost none."""
    for options in (dict(), dict(stopping="first", n_best=4), dict(min_length=6, banned=(7,)), dict(compat="hf")):
        few, many = (launches(cls, options | dict(max_length=steps), steps, monkeypatch) for steps in (10, 30))
        assert many - few == {"beam_topk": 20, "beam_update": 20}


@pytest.mark.parametrize("options", [*CONSTRAINED, *VARIED], ids=str)
def test_nothing_waits(options, monkeypatch):
    few, many = (launches(InPlaceNoWork, options | dict(max_length=n), n, monkeypatch) for n in (10, 20))
    assert (many - few)["beam_update"] == 10
    if options in CONSTRAINED[:2] + CONSTRAINED[3:5]:
        assert many - few == {"beam_topk": 10, "beam_update": 10}


def test_the_default_limit_is_known_without_asking(monkeypatch):
    assert launches(NoWork, dict(max_length=None), 2 * 3 + 10, monkeypatch)["beam_update"] == 16


def test_the_answer_is_one_wait(monkeypatch):
    """Hypotheses are as wide as the longest, which only the device knows."""
    model = TableModel(random_table(5, 997, 9, seed=63, eos_bias=1.0))
    source, lengths = torch.arange(5)[:, None], torch.ones(5, dtype=torch.int64)
    monkeypatch.setattr(beam_search.Unfinished, "count", lambda self, ask: None)

    def waits(**options):
        beam = BeamSearch(beam_size=4, n_best=3, max_length=9, **options)
        monkeypatch.setattr(beam_search, "hypotheses_of", lambda *_: Hypotheses.empty(1))
        with HostReads() as before:  # the limits, on the host; the lists that are copied
            beam.run(model, source, lengths)
        monkeypatch.setattr(beam_search, "hypotheses_of", finished.hypotheses_of)
        with HostReads() as all_of_it:
            beam.run(model, source, lengths)
        return all_of_it.count - before.count

    assert waits() == waits(groups=2) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [dict(), *CONSTRAINED, *VARIED], ids=str)
def test_a_gpu_finds_what_the_cpu_finds(options):
    sentences = 24
    table = random_table(sentences, 997, 12, seed=64, eos_bias=1.0)
    beam, source = strategy(options, sentences), torch.arange(sentences)[:, None]
    lengths = torch.ones(sentences, dtype=torch.int64)
    expected = beam.run(TableModel(table), source, lengths)
    for cls in (TableModel, ShrinkingTableModel, InPlace):
        with torch.no_grad():
            found = beam.run(cls(table.cuda()), source.cuda(), lengths.cuda())
        assert found.to_lists() == expected.to_lists()
        torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-5)
