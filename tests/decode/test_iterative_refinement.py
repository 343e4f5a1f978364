"""IterativeRefinement: when it stops, what it returns, and that sentences do not see each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import BOS, EOS, MASK, PAD, Lagging, RandomModel, ScriptedModel

from condgen_fast.decode import IterativeRefinement, decode, iterative_refinement


def scripted(next_output, length=3, **options):
    """A model that turns an output (None at first) into the next one."""

    def fill(sentence, canvas):
        inner = canvas[1:-1]
        tokens = next_output(sentence, None if MASK in inner else inner)
        return [(5, 0.5), *((token, 0.5) for token in tokens), (5, 0.5)]

    lengths = length if callable(length) else lambda sentence: {length: 1.0}
    return ScriptedModel(30, fill=fill, lengths=lengths, **options)


def counting(limit):
    """7 8 9 → 8 9 10 → … until the first token is `limit`."""
    return lambda sentence, output: (
        [7, 8, 9] if output is None else [min(t + 1, limit + i) for i, t in enumerate(output)]
    )


@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_fixed_point_stops_once_the_window_is_full(window):
    model = scripted(lambda sentence, output: [7, 8, 9])
    result = decode(model, [[5]], IterativeRefinement(window=window))
    assert result.iterations.tolist() == [window] and result.to_lists() == [[[7, 8, 9]]]
    assert model.calls["fill"] == window


def test_the_confirming_round_counts_and_the_maximum_holds():
    assert decode(scripted(counting(10)), [[5]], "refine").iterations.tolist() == [5]  # 7, 8, 9, 10, 10
    assert decode(scripted(counting(10)), [[5]], "refine").to_lists() == [[[10, 11, 12]]]
    short = decode(scripted(counting(10)), [[5]], "refine", max_iterations=2)
    assert short.iterations.tolist() == [2] and short.to_lists() == [[[8, 9, 10]]]


def test_a_cycle_ends_only_in_a_window_longer_than_it():
    swap = scripted(lambda sentence, output: [8, 7, 7] if output == [7, 8, 7] else [7, 8, 7])
    assert decode(swap, [[5]], IterativeRefinement(max_iterations=9)).iterations.tolist() == [9]
    result = decode(swap, [[5]], IterativeRefinement(max_iterations=9, window=5))
    assert result.iterations.tolist() == [5] and result.to_lists() == [[[7, 8, 7]]]  # the newest
    # The same tokens in another order are no distance apart as multisets.
    jaccard = decode(swap, [[5]], IterativeRefinement(max_iterations=9, distance="jaccard"))
    assert jaccard.iterations.tolist() == [2] and jaccard.to_lists() == [[[8, 7, 7]]]


@pytest.mark.parametrize(
    ("distance", "tolerance", "stops"),
    [("hamming", 0.3, 5), ("hamming", 0.34, 2), ("jaccard", 0.49, 5), ("jaccard", 0.5, 2)],
)
def test_the_tolerance_is_of_the_distance_named(distance, tolerance, stops):
    """One of three tokens changes a round: a Hamming distance of 1/3, two shared of four: a Jaccard distance of 1/2."""
    model = scripted(lambda sentence, output: [7, 8, 9] if output is None else [min(output[0] + 3, 16), 8, 9])
    result = decode(model, [[5]], IterativeRefinement(distance=distance, tolerance=tolerance))
    assert result.iterations.tolist() == [stops]


def test_jaccard_counts_repeated_tokens_as_often_as_they_stand():
    strategy = IterativeRefinement(distance="jaccard")
    torch.manual_seed(0)
    a, b = torch.randint(5, 9, (50, 9)), torch.randint(5, 9, (50, 9))
    inside = torch.arange(9) < torch.randint(1, 10, (50, 1))
    got = strategy._distances(a, b, inside)
    for row in range(50):
        x, y = a[row][inside[row]].tolist(), b[row][inside[row]].tolist()
        shared = sum(min(x.count(t), y.count(t)) for t in range(5, 9))
        assert float(got[row]) == pytest.approx(1 - shared / (2 * len(x) - shared))


def test_each_sentence_stops_by_itself_and_leaves():
    model = scripted(lambda sentence, output: counting(sentence)(sentence, output))
    result = decode(model, [[8], [12], [10], [7]], "refine")
    assert result.iterations.tolist() == [3, 7, 5, 2]
    assert [row[0][0] for row in result.to_lists()] == [8, 12, 10, 7]
    assert model.rows_seen == [4, 4, 3, 2, 2, 1, 1]


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(5, 16), min_size=1, max_size=5), min_size=1, max_size=4),
    window=st.integers(2, 4),
    maximum=st.integers(1, 8),
    distance=st.sampled_from(["hamming", "jaccard"]),
    tolerance=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 7),
)
def test_a_batch_equals_one_by_one_and_no_special_is_written(sources, window, maximum, distance, tolerance, seed):
    model = RandomModel(seed=seed)
    strategy = IterativeRefinement(
        max_iterations=maximum, window=window, distance=distance, tolerance=tolerance, trace=seed % 2 == 0
    )
    whole = decode(model, sources, strategy)
    for b, source in enumerate(sources):
        alone = decode(model, [source], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[b]
        assert alone.iterations[0] == whole.iterations[b] <= maximum and alone.scores[0] == whole.scores[b]
        assert not {PAD, BOS, EOS, MASK} & set(whole.to_lists()[b][0])
        if whole.trace:
            assert whole.trace[b].steps[-1].tokens[1:-1] == whole.to_lists()[b][0]


def test_on_a_gpu_the_host_is_one_round_behind_and_the_result_is_the_same(monkeypatch):
    """Finished sentences stay as they are in the round that runs while the host hears of them."""

    model = scripted(lambda sentence, output: [8, 7, 9] if output is None else [min(t + 1, sentence) for t in output])
    plain = decode(model, [[9], [25], [16]], IterativeRefinement(max_iterations=30, trace=True))
    assert model.rows_seen == [3] * 4 + [2] * 7 + [1] * 9
    monkeypatch.setattr(iterative_refinement, "Running", Lagging)
    model.rows_seen.clear()
    behind = decode(model, [[9], [25], [16]], IterativeRefinement(max_iterations=30, trace=True))
    assert torch.equal(plain.tokens, behind.tokens) and torch.equal(plain.token_log_probs, behind.token_log_probs)
    assert plain.iterations.tolist() == behind.iterations.tolist() == [4, 20, 11]
    assert plain.trace == behind.trace
    assert model.rows_seen == [3] * 5 + [2] * 7 + [1] * 9  # beyond the last, in which nothing changes


def test_scores_are_those_of_the_last_round():
    model = scripted(counting(8))
    result = decode(model, [[5]], "refine")
    assert result.token_log_probs[0, 0].exp().tolist() == pytest.approx([0.5, 0.5, 0.5, 1.0])
    assert float(result.scores[0, 0].exp()) == pytest.approx(0.5)


def test_given_tokens_are_where_it_starts():
    seen = []

    def next_output(sentence, output):
        seen.append(output)
        return [min(t + 1, 12) for t in output]

    model = scripted(next_output, length=99)
    result = decode(model, [[5], [6], [7]], IterativeRefinement(initial=[[11, 12], [9], []], trace=True))
    assert result.to_lists() == [[[12, 12]], [[12]], [[]]]
    assert result.iterations.tolist() == [2, 4, 0] and seen[0] == [11, 12]
    steps = [(s.operation, s.tokens[1:-1], s.touched[1:-1]) for s in result.trace[0].steps]
    assert steps == [
        ("start", [11, 12], [True, True]),
        ("rewrite", [12, 12], [True, False]),
        ("result", [12, 12], [False, False]),
    ]
    with pytest.raises(ValueError, match="initial must hold tokens for each of the 1 sentences; got 2"):
        decode(model, [[5]], IterativeRefinement(initial=[[6], [7]]))


def test_lengths_stay_within_the_models_positions():
    model = scripted(lambda sentence, output: [7, 8], length=lambda sentence: {2: 0.4, 9: 0.6}, max_positions=4)
    assert decode(model, [[5]], "refine").to_lists() == [[[7, 8]]]
    assert decode(RandomModel(), [], "refine").tokens.shape == (0, 1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "max_iterations must be >= 1; got 0"),
        ({"window": 1}, "window must be >= 2; got 1"),
        ({"distance": "edit"}, "distance must be 'hamming' or 'jaccard'; got 'edit'"),
        ({"tolerance": 1.5}, r"tolerance must be in \[0.0, 1.0\]; got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode(RandomModel(), [[5]], "refine", **options)
