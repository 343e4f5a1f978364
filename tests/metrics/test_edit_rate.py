from __future__ import annotations

import random

import pytest
from rapidfuzz.distance import Levenshtein

from condgen_fast.metrics import corpus_edit_rate, edit_rates, remove_repeats, repetitions, ter


def test_by_hand():
    rows = [
        ["a b c d", "a b c d"],
        ["a x c d", "a b c d"],
        ["a", "a b"],
        ["a b c", "a"],
        ["", "a b"],
        ["a b", ""],
        ["", ""],
    ]
    hypotheses, references = ([line.split() for line in side] for side in zip(*rows, strict=True))
    assert edit_rates(hypotheses, references) == [0, 25, 50, 200, 100, 100, 0]
    assert edit_rates([[7, 8]], [[7, 9]]) == [50]
    assert edit_rates([], []) == []
    assert corpus_edit_rate(hypotheses, references) == 100 * (0 + 1 + 1 + 2 + 2 + 2 + 0) / 13
    assert corpus_edit_rate([], []) == 0 and corpus_edit_rate([["a"]], [[]]) == 100


def test_many_lines_and_the_bound_on_ter():
    generator = random.Random(1)
    lines = [[generator.choice("abcdefgh") for _ in range(generator.randrange(1, 40))] for _ in range(600)]
    others = [generator.sample(line, len(line)) if generator.random() < 0.5 else line[::2] for line in lines]
    rates = edit_rates(others, lines)
    assert rates == [100 * Levenshtein.distance(x, y) / len(y) for x, y in zip(others, lines, strict=True)]
    for other, line, rate in list(zip(others, lines, rates, strict=True))[:30]:
        assert ter([" ".join(other)], [" ".join(line)]).score <= rate + 1e-9


def test_repeats_are_removed():
    rows = ["a a a b".split(), [], [3, 3, 4, 3, 3], ["x"]] + [["w"] * 3] * 300
    assert remove_repeats(rows)[:4] == [["a", "b"], [], [3, 4, 3], ["x"]]
    assert repetitions(rows) == [2, 0, 2, 0] + [2] * 300


def test_refusals():
    with pytest.raises(ValueError, match="hypotheses and references must have the same length; got 1 and 2"):
        edit_rates([["a"]], [["a"], ["b"]])
    with pytest.raises(TypeError, match="rows must be lists of tokens; got the str 'a b'"):
        edit_rates(["a b"], ["a b"])
