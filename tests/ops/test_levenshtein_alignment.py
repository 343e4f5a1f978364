"""edit_alignment, and edit_distance of all pairs."""

from __future__ import annotations

import random

import pytest
import torch
from levenshtein_cases import DTYPES, IMPLS, MASK, PAD, assert_equal, batch, ids, random_pairs
from rapidfuzz.distance import Indel, Levenshtein

from condgen_fast.ops.levenshtein import edit_alignment, edit_distance


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("x", "y", "columns", "distance"),
    [
        ("kitten", "sitting", ["kitten-", "sitting"], 3),
        ("aab", "ab", ["aab", "-ab"], 1),  # a pair before a deletion, from the end
        ("ab", "ba", ["ab", "ba"], 2),  # two substitutions, where a deletion and an insertion cost the same
        ("abc", "c", ["abc", "--c"], 2),
        ("bc", "abd", ["-bc", "abd"], 2),
        ("", "ab", ["--", "ab"], 2),
        ("ab", "", ["ab", "--"], 2),
    ],
)
def test_alignments_worked_by_hand(device, impl, x, y, columns, distance):
    gap = 99
    tokens, target = (batch([ids(word), ids("a")], width=8, device=device) for word in (x, y))
    found = edit_alignment(tokens, target, pad_id=PAD, gap_id=gap, impl=impl)
    spelled = [[gap if letter == "-" else ids(letter)[0] for letter in row] for row in columns]
    length = len(columns[0])
    assert found.lengths.tolist() == [length, 1] and found.distance.tolist() == [distance, 0]
    assert [found.tokens[0, :length].tolist(), found.target[0, :length].tolist()] == spelled
    assert found.tokens.shape == found.target.shape == (2, 16)
    assert (found.tokens[0, length:] == PAD).all() and (found.target[0, length:] == PAD).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments_of_random_pairs(device, dtype):
    rows, targets = random_pairs(150, random.Random(23))
    tokens, target = (batch(side, device=device, dtype=dtype) for side in (rows, targets))
    wanted = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK, impl="reference")
    found = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
    assert_equal(found, wanted, rows, targets)
    assert found.distance.tolist() == [Levenshtein.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    for b, length in enumerate(found.lengths.tolist()):
        for aligned, row in ((found.tokens, rows[b]), (found.target, targets[b])):
            assert [token for token in aligned[b, :length].tolist() if token != MASK] == row


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cost", ["levenshtein", "indel"])
def test_all_pairs(device, impl, cost):
    rows, targets = random_pairs(23, random.Random(24))
    rows, targets = [row[:60] for row in rows], [row[:90] for row in targets[:11]]
    a, b = batch(rows, device=device), batch(targets, device=device)
    found = edit_distance(a, b, pad_id=PAD, cost=cost, all_pairs=True, impl=impl)
    distance = {"levenshtein": Levenshtein, "indel": Indel}[cost].distance
    assert found.tolist() == [[distance(x, y) for y in targets] for x in rows]
    assert edit_distance(a[:0], b, pad_id=PAD, all_pairs=True, impl=impl).shape == (0, 11)
    assert edit_distance(a, b[:0], pad_id=PAD, all_pairs=True, impl=impl).shape == (23, 0)
    bad = torch.tensor([[10, 11], [10, 12], [PAD, 13]])
    with pytest.raises(ValueError, match="b must be right-padded; got pad_id 0 before a token in row 2, position 0"):
        edit_distance(bad[:2], bad, pad_id=PAD, all_pairs=True, impl=impl)
