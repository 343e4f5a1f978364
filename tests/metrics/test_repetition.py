"""Repeated tokens."""

from __future__ import annotations

import pytest

from condgen_fast.metrics import repeated_token_rate, repeated_tokens


@pytest.mark.parametrize(
    ("tokens", "count"),
    [("a a a b", 2), ("a b a b", 0), ("", 0), ("a", 0), ("a a b b", 2)],
)
def test_count(tokens, count):
    assert repeated_tokens(tokens.split()) == count


def test_rate_is_of_the_corpus_and_rows_do_not_touch():
    assert repeated_token_rate([[1, 1, 1, 2]]) == 0.5
    assert repeated_token_rate([[1, 1], [1, 2, 3, 4, 5, 6]]) == 1 / 8
    assert repeated_token_rate([[1], [1]]) == 0
    assert repeated_token_rate([]) == repeated_token_rate([[]]) == 0


def test_a_sentence_is_not_a_row():
    with pytest.raises(TypeError, match="rows must be lists of tokens"):
        repeated_token_rate(["a a b"])
