"""Greedy search against an argmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ShrinkingTableModel, TableModel, log_probs_of, random_table

from condgen_fast.decode import Greedy, decode


def by_hand(model, sentence, *, max_length, min_length=0):
    tokens = []
    for length in range(1, max_length + 1):
        node = 0
        for token in tokens:
            node = (node * model.vocab_size + token + 1) % model.table.shape[1]
        row = model.table[sentence, node].clone()
        row[[model.pad_id, model.bos_id]] = -math.inf
        if length < min_length:
            row[model.eos_id] = -math.inf
        token = int(row.argmax())
        if token == model.eos_id or length == max_length:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("cls", [TableModel, ShrinkingTableModel])
@pytest.mark.parametrize("min_length", [0, 4])
def test_takes_the_most_probable_token(cls, min_length):
    model = cls(random_table(200, 997, 10, seed=20, eos_bias=1.0))
    found = decode(model, [[s] for s in range(200)], "greedy", max_length=9, min_length=min_length, length_penalty=0.5)
    for s in range(200):
        tokens = by_hand(model, s, max_length=9, min_length=min_length)
        assert found.to_lists()[s][0] == tokens
        expected = log_probs_of(model, s, tokens)
        length = len(expected)
        assert found.iterations[s] == length
        assert found.token_log_probs[s, 0, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert (found.token_log_probs[s, 0, length:] == 0).all()
        assert (found.tokens[s, 0, length - 1 :] == model.pad_id).all()
        assert found.scores[s, 0].item() == pytest.approx(math.fsum(expected) / length**0.5, abs=1e-5)
    assert found.lengths.min() == max(min_length - 1, 0) and found.lengths.max() == 8


def test_a_sentence_decodes_the_same_in_any_batch():
    model = ShrinkingTableModel(random_table(60, 997, 12, seed=21, eos_bias=1.5))
    source = [[s % 9 + 2] * (s % 4 + 1) for s in range(60)]
    whole = decode(model, source, "greedy")
    assert model.row_counts[-1] < 30
    backwards = decode(model, source[::-1], "greedy")
    assert backwards.to_lists() == whole.to_lists()[::-1]
    assert torch.equal(backwards.scores.flip(0), whole.scores)
    for i in range(0, 60, 7):
        alone = decode(model, [source[i]], "greedy")
        assert alone.to_lists()[0] == whole.to_lists()[i] and alone.scores[0] == whole.scores[i]


def test_ties_go_to_the_lower_token():
    assert decode(TableModel(torch.zeros(1, 7, 5)), [[0]], Greedy(min_length=3, max_length=4)).to_lists() == [[[2, 2]]]
