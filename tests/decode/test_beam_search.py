"""Beam search against brute force, a plain Python search, and itself in other batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    ShrinkingTableModel,
    TableModel,
    all_hypotheses,
    assert_consistent,
    assert_same,
    plain_beam_search,
    random_table,
)
from torch.utils._python_dispatch import TorchDispatchMode

from condgen_fast.decode import BeamSearch, Greedy, Sampling, beam_search, decode, left_to_right

SCORES = [("power", 1.0), ("power", 0.0), ("power", 2.0), ("power", -0.7), ("gnmt", 0.6), ("gnmt", -1.0), ("none", 1.0)]
STOPPING = ["exact", "heuristic", "first"]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize(("normalization", "length_penalty"), SCORES)
def test_exhaustive_beam_finds_the_best_of_all_sequences(normalization, length_penalty, stopping, impl):
    V, longest, sentences = 5, 5, 8
    model = TableModel(random_table(sentences, sum(V**i for i in range(longest)), V, seed=1))
    score = dict(normalization=normalization, length_penalty=length_penalty)
    beam = BeamSearch(beam_size=130, n_best=6, stopping=stopping, max_length=longest, impl=impl, **score)
    found = decode(model, [[s] for s in range(sentences)], beam)
    for s in range(sentences):
        best = all_hypotheses(model, s, longest, **score)[:6]
        assert found.to_lists()[s] == [tokens for _, tokens in best]
        assert found.scores[s].tolist() == pytest.approx([value for value, _ in best], abs=1e-5)
    assert_consistent(model, range(sentences), found, **score)


@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize(("normalization", "length_penalty"), SCORES)
def test_small_beams_follow_the_plain_search(normalization, length_penalty, stopping):
    """Of all cases together 12,600 searches, each of a table of its own; 10,000 and more have no near ties."""
    case = SCORES.index((normalization, length_penalty)) * len(STOPPING) + STOPPING.index(stopping)
    generator = torch.Generator().manual_seed(case)
    compared = 0
    for trial in range(4):
        sentences, V = 75, int(torch.randint(3, 9, (), generator=generator))
        beam_size = int(torch.randint(1, 6, (), generator=generator))
        options = dict(
            beam_size=beam_size,
            n_best=int(torch.randint(1, beam_size + 1, (), generator=generator)),
            normalization=normalization,
            length_penalty=length_penalty,
            stopping=stopping,
            patience=1.0 if stopping == "exact" else [1.0, 0.5, 2.0, 1.0][trial],
            min_length=[0, 3, 0, 1][trial],
            max_length=9,
            no_repeat_ngram=[0, 0, 2, 1][trial],
        )
        for i, cls in enumerate((TableModel, ShrinkingTableModel)):
            seed = (case * 4 + trial) * 2 + i
            model = cls(random_table(sentences, 997, V, seed=seed, eos_bias=[0.0, 2.0, 0.0, -1.0][trial]))
            found = decode(model, [[s] for s in range(sentences)], BeamSearch(**options))
            for s in range(sentences):
                expected = plain_beam_search(model, s, **options)
                if expected.margin < 1e-5:
                    continue
                compared += 1
                n = len(expected.hypotheses)
                assert found.to_lists()[s][:n] == [tokens for _, tokens in expected.hypotheses]
                assert found.scores[s, :n].tolist() == pytest.approx([v for v, _ in expected.hypotheses], abs=1e-5)
                assert (found.scores[s, n:] == -math.inf).all() and (found.lengths[s, n:] == 0).all()
                assert found.iterations[s] == expected.steps
            assert_consistent(model, range(sentences), found, normalization, length_penalty)
    assert compared > 500


@pytest.mark.parametrize(("normalization", "length_penalty"), SCORES)
def test_exact_stopping_loses_nothing_against_running_to_the_limit(normalization, length_penalty):
    """The same beam, never stopped (a finished list that never fills), cannot find anything better."""
    sentences = 300
    model = TableModel(random_table(sentences, 499, 6, seed=3, eos_bias=1.0))
    score = dict(normalization=normalization, length_penalty=length_penalty, max_length=12, beam_size=3, n_best=2)
    source = [[s] for s in range(sentences)]
    exact = decode(model, source, BeamSearch(**score))
    unstopped = decode(model, source, BeamSearch(**score, stopping="first", patience=100))
    assert exact.to_lists() == unstopped.to_lists()
    assert (unstopped.iterations == 12).all()
    if length_penalty <= 0 or normalization == "none":
        assert exact.iterations.float().mean() < 11


def test_early_stopping_rules_do_lose_at_a_high_length_penalty():
    sentences = 300
    model = TableModel(random_table(sentences, 499, 6, seed=4, eos_bias=1.0))
    source = [[s] for s in range(sentences)]
    options = dict(beam_size=3, length_penalty=2.0, max_length=12)
    scores = {rule: decode(model, source, BeamSearch(**options, stopping=rule)).scores for rule in STOPPING}
    assert (scores["exact"] >= scores["heuristic"]).all() and (scores["exact"] >= scores["first"]).all()
    assert (scores["exact"] > scores["heuristic"]).any() and (scores["exact"] > scores["first"]).any()


@pytest.mark.parametrize("cls", [TableModel, ShrinkingTableModel])
@pytest.mark.parametrize("stopping", STOPPING)
def test_a_sentence_decodes_the_same_in_any_batch(cls, stopping):
    sentences = 40
    model = cls(random_table(sentences, 997, 12, seed=5, eos_bias=1.5))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (sentences,), generator=generator).tolist()
    source = [torch.randint(2, 30, (n,), generator=generator).tolist() for n in lengths]
    beam = BeamSearch(beam_size=4, n_best=3, stopping=stopping)
    whole = decode(model, source, beam)
    order = torch.randperm(sentences, generator=generator).tolist()
    assert_same(decode(model, [source[i] for i in order], beam), whole, order)
    for part in (range(0, 1), range(1, 8), range(8, 40)):
        assert_same(decode(model, [source[i] for i in part], beam), whole, list(part))
    padded = torch.zeros(sentences, 20, dtype=torch.int64)
    for row, sentence in zip(padded, source, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    assert_same(decode(model, padded, beam), whole)
    padded[torch.arange(20) >= torch.tensor(lengths)[:, None]] = 7
    assert_same(decode(model, padded, beam, source_lengths=torch.tensor(lengths)), whole)
    if cls is ShrinkingTableModel:
        model.row_counts.clear()
        decode(model, source, beam)
        assert model.row_counts[0] == sentences and model.row_counts[-1] < sentences // 2


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_of_one_is_greedy(length_penalty):
    sentences = 200
    model = TableModel(random_table(sentences, 997, 9, seed=6, eos_bias=0.5))
    source = [[s] for s in range(sentences)]
    options = dict(length_penalty=length_penalty, min_length=3, max_length=10)
    greedy = decode(model, source, Greedy(**options))
    beam = decode(model, source, BeamSearch(beam_size=1, stopping="first", **options))
    assert greedy.to_lists() == beam.to_lists()
    torch.testing.assert_close(greedy.scores, beam.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(greedy.token_log_probs, beam.token_log_probs, rtol=0, atol=1e-5)
    assert torch.equal(greedy.iterations, beam.iterations)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "strategy",
    [BeamSearch(), BeamSearch(stopping="heuristic", no_repeat_ngram=2), Greedy(), Sampling(seed=1, top_k=5, top_p=0.9)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_the_host_asks_the_device_once_in_eight_steps(monkeypatch, strategy):
    """With the rhythm of a GPU: the same result, and reads that grow by one in eight steps."""
    model = TableModel(random_table(30, 499, 8, seed=17, eos_bias=-30.0))
    model_ending = ShrinkingTableModel(random_table(30, 499, 8, seed=17, eos_bias=1.0))
    source = [[s] for s in range(30)]
    expected = decode(model_ending, source, strategy)
    for module in (beam_search, left_to_right):
        monkeypatch.setattr(module, "check_due", lambda step, device: (step + 1) % 8 == 0)
    found = decode(model_ending, source, strategy)
    assert found.to_lists() == expected.to_lists() and torch.equal(found.iterations, expected.iterations)
    reads = []
    for longest in (16, 32):
        with HostReads() as host:
            decode(model, source, replace(strategy, max_length=longest))
        reads.append(host.count)
    assert reads[1] - reads[0] == 2


def test_beam_wider_than_the_vocabulary():
    model = TableModel(random_table(5, 499, 3, seed=7))  # pad = bos, eos and one more token
    found = decode(model, [[s] for s in range(5)], BeamSearch(beam_size=20, n_best=8, max_length=5))
    for s in range(5):
        best = all_hypotheses(model, s, 5, normalization="power", length_penalty=1.0)
        assert len(best) == 5
        assert found.to_lists()[s] == [tokens for _, tokens in best] + [[]] * 3
        assert (found.scores[s, 5:] == -math.inf).all()
        assert (found.token_log_probs[s, 5:].sum(1) == -math.inf).all()


def test_max_length_one_allows_only_eos():
    model = TableModel(random_table(3, 499, 6, seed=8, eos_bias=-9.0))
    for options in (dict(), dict(stopping="first"), dict(beam_size=1)):
        found = decode(model, [[0], [1], [2]], BeamSearch(max_length=1, **options))
        assert found.tokens.shape == (3, 1, 0) and found.token_log_probs.shape == (3, 1, 1)
        assert (found.lengths == 0).all() and (found.iterations == 1).all()
        assert_consistent(model, range(3), found)


def test_eos_at_the_first_step():
    model = TableModel(random_table(3, 499, 6, seed=9, eos_bias=30.0))
    found = decode(model, [[0], [1], [2]], BeamSearch(beam_size=4, length_penalty=0.0))
    assert (found.lengths == 0).all() and (found.iterations == 1).all()
    longer = decode(model, [[0], [1], [2]], BeamSearch(beam_size=4, length_penalty=0.0, min_length=3))
    assert (longer.lengths == 2).all()


def test_min_length_raises_the_default_limit():
    """Of a source of one token that is 12; only `max_length` and the model's positions are stronger."""
    model = TableModel(random_table(64, 997, 9, seed=40, eos_bias=1.0))
    found = decode(model, [[5]], BeamSearch(beam_size=2, min_length=30))
    assert found.lengths[0, 0] + 1 >= 30


def test_min_length_gives_way_to_the_limit():
    model = TableModel(random_table(2, 499, 6, seed=9))
    model.max_positions = 4
    found = decode(model, [[0], [1]], BeamSearch(min_length=50))
    assert (found.lengths == 3).all()


def test_default_limit_is_per_sentence():
    model = TableModel(random_table(50, 499, 6, seed=10, eos_bias=-30.0))
    found = decode(model, [[3], [3, 4, 5]], "beam")
    assert found.lengths[:, 0].tolist() == [2 * 1 + 10 - 1, 2 * 3 + 10 - 1]
    assert found.iterations.tolist() == [12, 16]


def test_no_repeat_ngram_keeps_the_models_log_probs():
    sentences = 30
    model = TableModel(random_table(sentences, 97, 5, seed=11, eos_bias=-4.0))
    found = decode(model, [[s] for s in range(sentences)], BeamSearch(no_repeat_ngram=2, max_length=10))
    for tokens in (hypotheses[0] for hypotheses in found.to_lists()):
        pairs = list(zip(tokens, tokens[1:], strict=False))
        assert len(pairs) == len(set(pairs))
    assert_consistent(model, range(sentences), found)


@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_rows_without_a_distribution(poison):
    """A sentence whose logits are all NaN or -inf, or +inf among them, has no hypothesis; others do not notice."""
    table = random_table(4, 499, 6, seed=12)
    clean = decode(TableModel(table), [[0], [2], [3]], BeamSearch(beam_size=3))
    table[1, :, :: 2 if poison == math.inf else 1] = poison
    for model in (TableModel(table), ShrinkingTableModel(table)):
        found = decode(model, [[0], [1], [2], [3]], BeamSearch(beam_size=3))
        assert found.scores[1, 0] == -math.inf and found.lengths[1, 0] == 0
        assert found.token_log_probs[1, 0, 0] == -math.inf
        assert_same(clean, found, [0, 2, 3])
        greedy = decode(model, [[1], [2]], "greedy")
        assert greedy.scores[0, 0] == -math.inf and greedy.lengths[0, 0] == 0 and greedy.scores[1, 0] > -math.inf


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize(
    "strategy",
    [
        BeamSearch(beam_size=6, n_best=6),
        BeamSearch(no_repeat_ngram=1, max_length=5),
        Greedy(max_length=3),
        Sampling(seed=0),
        Sampling(seed=0, top_k=6),
    ],
    ids=str,
)
def test_impossible_tokens_are_never_chosen(strategy, value):
    table = random_table(10, 499, 8, seed=13)
    table[:, :, 5:] = value
    found = decode(TableModel(table), [[s] for s in range(10)], strategy)
    table[:, :, 5:] = -math.inf
    model = TableModel(table)
    assert found.tokens.max() < 5
    assert_consistent(model, range(10), found)


@pytest.mark.parametrize(("pad_id", "bos_id", "eos_id"), [(0, 0, 1), (5, 0, 2), (1, 2, 2), (2, 0, 2), (5, 5, 0)])
def test_special_ids_may_coincide(pad_id, bos_id, eos_id):
    model = TableModel(random_table(6, 4096, 6, seed=14), pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    source = torch.tensor([[s] for s in range(6)])
    beam = BeamSearch(beam_size=600, max_length=4)
    found = decode(model, source, beam, source_lengths=torch.ones(6, dtype=torch.int64))
    for s in range(6):
        best = all_hypotheses(model, s, 4, normalization="power", length_penalty=1.0)[0]
        assert found.to_lists()[s][0] == best[1]
        assert found.scores[s, 0].item() == pytest.approx(best[0], abs=1e-5)


def test_ties_go_to_the_lower_token_and_the_earlier_end():
    model = TableModel(torch.zeros(1, 499, 6))
    found = decode(model, [[0]], BeamSearch(beam_size=2, n_best=2, length_penalty=0.0, max_length=4))
    assert found.to_lists()[0] == [[], [2]]


def test_half_precision_logits():
    table = random_table(20, 499, 16, seed=15)
    found = decode(TableModel(table.bfloat16()), [[s] for s in range(20)], BeamSearch())
    assert found.scores.dtype == torch.float32
    assert_consistent(TableModel(table.bfloat16()), range(20), found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beam_size=0), "beam_size must be in .1, 65536.; got 0"),
        (dict(beam_size=10**9), "beam_size must be in .1, 65536.; got 1000000000"),
        (dict(n_best=6), "n_best must be at most beam_size = 5; got 6"),
        (dict(normalization="gmnt"), "normalization"),
        (dict(stopping="never"), "stopping"),
        (dict(patience=0), "patience"),
        (dict(patience=2.0), "patience must be 1 with exact stopping; got 2.0"),
        (dict(min_length=-1), "min_length must be >= 0; got -1"),
        (dict(min_length=5, max_length=4), "min_length must be at most max_length = 4; got 5"),
        (dict(max_length=0), "max_length must be >= 1; got 0"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram must be >= 0; got -1"),
        (dict(length_penalty=math.nan), "length_penalty"),
        (dict(length_penalty=11), "length_penalty"),
        (dict(impl="fast"), "impl"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**options)


def test_stopping_follows_compat_in_a_copy():
    beam = replace(BeamSearch(), compat="hf")
    assert beam.stopping is None and beam.stopping_rule == "heuristic"
    assert replace(BeamSearch(compat="fairseq", patience=2.0), compat=None, patience=1.0).stopping_rule == "exact"
    with pytest.raises(ValueError, match="patience must be 1 with exact stopping"):
        replace(BeamSearch(compat="fairseq", patience=2.0), compat=None)


def test_more_beams_than_a_gpu_finds_are_refused_at_once():
    gpu = torch.device("cuda")
    BeamSearch(beam_size=512)._check_on(gpu, 1, 50)
    BeamSearch(beam_size=1024, groups=2)._check_on(gpu, 1, 50)
    BeamSearch(beam_size=1024)._check_on(gpu, 1, 1)
    BeamSearch(beam_size=513)._check_on(torch.device("cpu"), 1, 50)
    with pytest.raises(ValueError, match=r"beam_size must be at most 512 on a GPU with 1 end\(s\); got 513"):
        BeamSearch(beam_size=513)._check_on(gpu, 1, 50)
    with pytest.raises(ValueError, match="beam_size must be at most 341"):
        BeamSearch(beam_size=342)._check_on(gpu, 2, 50)


def test_options_of_a_wrong_type():
    for options in (dict(beam_size=2.0), dict(length_penalty="1"), dict(max_length=True)):
        with pytest.raises(TypeError, match=next(iter(options))):
            BeamSearch(**options)


def test_max_length_beyond_the_models_positions():
    model = TableModel(random_table(1, 499, 6, seed=16))
    model.max_positions = 8
    with pytest.raises(ValueError, match="max_length must be at most model.max_positions = 8; got 9"):
        decode(model, [[0]], BeamSearch(max_length=9))
    assert decode(model, [[0]], BeamSearch(max_length=8)).lengths.max() <= 7


@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize("V", [4, 6])
def test_brute_force_over_six_tokens(V, stopping):
    """All hypotheses of up to six tokens, eos included (1365 over six ids), with a beam that holds them all."""
    longest, sentences = 6, 2
    model = TableModel(random_table(sentences, sum(V**i for i in range(longest)), V, seed=V))
    width = (V - 2) ** (longest - 1)
    for normalization, length_penalty in SCORES:
        score = dict(normalization=normalization, length_penalty=length_penalty)
        # a finished list that holds every hypothesis, so that no rule but the limit stops
        patience = 1.0 if stopping == "exact" else 1.5
        beam = BeamSearch(beam_size=width, n_best=8, stopping=stopping, patience=patience, max_length=longest, **score)
        found = decode(model, [[s] for s in range(sentences)], beam)
        for s in range(sentences):
            best = all_hypotheses(model, s, longest, **score)[:8]
            assert found.to_lists()[s] == [tokens for _, tokens in best]
            assert found.scores[s].tolist() == pytest.approx([value for value, _ in best], abs=1e-5)
