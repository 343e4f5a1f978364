from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levenshtein_cases import (
    BOS,
    DTYPES,
    EOS,
    IDS,
    IMPLS,
    PAD,
    SLOTS,
    applied,
    assert_equal,
    batch,
    ids,
    random_pairs,
    sentence,
)
from rapidfuzz.distance import Indel, Levenshtein

from condgen_fast.ops.levenshtein import apply_edits, edit_distance, edit_oracle


@pytest.mark.parametrize("slots", SLOTS)
def test_every_pair_up_to_length_four(device, slots):
    words = [list(word) for n in range(5) for word in itertools.product((10, 11, 12), repeat=n)]
    pairs = list(itertools.product(words, words))
    if slots == "source":  # delete, masked and distance do not depend on slots: a third is enough for insert
        pairs = pairs[::3]
    rows, targets = [sentence(x) for x, _ in pairs], [sentence(y) for _, y in pairs]
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)


def test_ten_thousand_random_pairs(device):
    rows, targets = random_pairs(10_000, random.Random(20))
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    kept = edit_oracle(tokens, target, pad_id=PAD)
    source = edit_oracle(tokens, target, pad_id=PAD, slots="source")
    for slots, labels in (("kept", kept), ("source", source)):
        for b, (delete, insert, masked) in enumerate(zip(*(value.tolist() for value in labels[:3]), strict=True)):
            assert applied(rows[b], targets[b], delete, insert, masked, slots) == targets[b]
    indel = [Indel.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    assert kept.distance.tolist() == source.distance.tolist() == indel
    assert (kept.delete.sum(1) + kept.insert.sum(1)).tolist() == indel
    assert (source.delete.sum(1) + source.masked.sum(1)).tolist() == indel
    assert edit_distance(tokens, target, pad_id=PAD, cost="indel").tolist() == indel
    levenshtein = [Levenshtein.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    assert edit_distance(tokens, target, pad_id=PAD).tolist() == levenshtein
    result = apply_edits(tokens, delete=kept.delete, insert=kept.insert, max_length=target.shape[1], fill=target, **IDS)
    assert torch.equal(result.tokens, target)
    assert torch.equal(result.origin == -1, kept.masked | (target == PAD))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_pairs_equal_the_reference(device, dtype, slots):
    rows, targets = random_pairs(150, random.Random(21))
    tokens, target = (batch(side, width=300, device=device, dtype=dtype) for side in (rows, targets))
    wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)


@pytest.mark.parametrize(("alphabet", "length"), [(2, 300), (40, 700), (5000, 1500)])
def test_long_sentences_equal_the_reference(device, alphabet, length):
    generator = random.Random(alphabet)
    row, target = (sentence([10 + generator.randrange(alphabet) for _ in range(length)]) for _ in range(2))
    edited = sentence([t if generator.random() < 0.7 else 10 + generator.randrange(alphabet) for t in target[1:-1]])
    rows, targets = ([row], [target]) if length > 1000 else ([row, edited], [target, target])
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    wanted = edit_oracle(tokens, target, pad_id=PAD, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD), wanted, rows, targets)
    for cost in ("levenshtein", "indel"):
        reference = edit_distance(tokens, target, pad_id=PAD, cost=cost, impl="reference")
        assert torch.equal(edit_distance(tokens, target, pad_id=PAD, cost=cost), reference)


@pytest.mark.parametrize("largest", [2**15, 2**16 + 5, 2**31 + 5, 2**40])
def test_ids_of_every_size(device, largest):
    """Ids of up to 16, 32 and 64 bits take different paths; the change comes within a batch, and at the padding."""
    generator = random.Random(largest)
    rows, targets = random_pairs(40, generator)
    rows, targets = [row[:60] for row in rows], [row[:60] for row in targets]
    for side in (rows, targets):
        for row in side[20:]:
            row[1:-1] = [token + largest if generator.random() < 0.9 else -token for token in row[1:-1]]
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    for pad in (PAD, -5, largest * 2):
        x, y = (side.masked_fill(side == PAD, pad) for side in (tokens, target))
        x, y = (torch.nn.functional.pad(side, (0, 1), value=pad) for side in (x, y))
        for side, whole in ((x, rows), (y, targets)):  # so that every insertion has a slot
            side[torch.arange(40), [len(row) for row in whole]] = 7
        wanted = edit_oracle(x, y, pad_id=pad, slots="source", impl="reference")
        assert_equal(edit_oracle(x, y, pad_id=pad, slots="source"), wanted, rows, targets)
        found = edit_distance(x, y, pad_id=pad)
        assert torch.equal(found, edit_distance(x, y, pad_id=pad, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("x", "y", "distance", "delete", "insert"),
    [
        ("kitten", "sitting", 5, [1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1]),
        ("abcd", "acbd", 2, [0, 1, 0, 0], [0, 0, 1, 0]),
        ("aab", "ab", 1, [0, 1, 0], [0, 0, 0]),
        ("ab", "aab", 1, [0, 0], [0, 1, 0]),
        ("abab", "baba", 2, [1, 0, 0, 0], [0, 0, 0, 1]),
        ("", "abc", 3, [], [3]),
        ("abc", "", 3, [1, 1, 1], [0]),
    ],
)
def test_worked_examples(device, impl, x, y, distance, delete, insert):
    """Scripts worked by hand; with bos and eos around, slots reach from the first token to behind the last."""
    tokens, target = (batch([sentence(ids(word))], device=device) for word in (x, y))
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [distance]
    assert labels.delete[0].tolist() == [False, *map(bool, delete), False]
    assert labels.insert[0].tolist() == (insert + [0] * len(x))[: len(x) + 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_slots(device, impl):
    tokens, target = batch([sentence(ids("abcx"))], device=device), batch([sentence(ids("ayyx"))], device=device)
    kept = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    source = edit_oracle(tokens, target, pad_id=PAD, slots="source", impl=impl)
    assert kept.delete.tolist() == source.delete.tolist() == [[False, False, True, True, False, False]]
    assert kept.insert.tolist() == [[0, 2, 0, 0, 0]]
    assert source.insert.tolist() == [[0, 0, 0, 2, 0]]
    assert kept.masked.tolist() == source.masked.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("x", "y"), [([BOS, 10], [11, BOS, 10]), ([BOS, 10], [BOS, 10, 11]), ([], [10]), ([10, 11], [12, 13])]
)
def test_insertions_without_a_slot_are_refused(impl, slots, x, y):
    tokens, target = batch([[BOS], x, [10, BOS]], width=4), batch([[BOS], y, [11]], width=4)
    message = (
        f"target must need no insertion before the first or after the last {slots} token; got one in row 1 "
        r"\(let tokens and target share bos and eos\)"
    )
    with pytest.raises(ValueError, match=message):
        edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_bos_and_eos(device, impl):
    """bos and eos are ordinary tokens: any rows will do while the insertions lie between kept tokens."""
    rows, targets = [[10, 11, 12], [], [10, 10], []], [[10, 13, 12], [], [10, 10], []]
    labels = edit_oracle(batch(rows, width=4, device=device), batch(targets, device=device), pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [2, 0, 0, 0]
    assert labels.insert.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert edit_oracle(
        batch([[10, 11]], device=device), batch([[]], device=device), pad_id=PAD, impl=impl
    ).delete.tolist() == [[True, True]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(0, 5, 7), (0, 0, 0), (3, 0, 0), (3, 4, 0), (2, 1, 3)])
def test_empty_and_all_padding(device, impl, sizes):
    rows, width, target_width = sizes
    tokens = torch.full((rows, width), PAD, device=device)
    target = torch.full((rows, target_width), PAD, device=device)
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert [tuple(value.shape) for value in labels] == [
        (rows, width), (rows, max(width - 1, 0)), (rows, target_width), (rows,)
    ]  # fmt: skip
    assert not any(value.any() for value in labels)
    for cost in ("levenshtein", "indel"):
        assert edit_distance(tokens, target, pad_id=PAD, cost=cost, impl=impl).tolist() == [0] * rows
    result = apply_edits(tokens, delete=labels.delete, insert=labels.insert, scores=tokens.float(), **IDS, impl=impl)
    assert result.lengths.tolist() == [0] * rows
    assert (result.tokens == PAD).all() and (result.origin == -1).all()
    wider = apply_edits(tokens, insert=labels.insert, scores=tokens.float(), max_length=9, **IDS, impl=impl)
    assert wider.scores.tolist() == [[0.0] * 9] * rows  # of no tokens at all they are 0, too


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_and_negative_ids_widths_and_strides(device, impl):
    low, high = -(2**63), 2**63 - 1
    rows, targets = [[BOS, low, high, -1, EOS]], [[BOS, high, low, -1, -1, EOS]]
    tokens = batch(rows, width=90, device=device).repeat_interleave(2, 1)[:, ::2]
    target = batch(targets, device=device).t().contiguous().t()
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [3] == [Indel.distance(rows[0], targets[0])]
    result = apply_edits(tokens, delete=labels.delete, insert=labels.insert, fill=target, **IDS, impl=impl)
    assert torch.equal(result.tokens, target)
    assert (
        edit_distance(tokens, target, pad_id=PAD, impl=impl).tolist() == [2] == [Levenshtein.distance(*rows, *targets)]
    )
    # ids that fall on one another in a hash table of few slots
    far = batch([sentence([k << 57 for k in range(1, 60)])], device=device)
    assert edit_distance(far, far.flip(1), pad_id=PAD, impl=impl).tolist() == [60]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_pairs(data):
    token = st.integers(10, data.draw(st.sampled_from((10, 11, 14, 2**40))))
    inner = st.lists(token, max_size=data.draw(st.sampled_from((4, 80, 200))))
    pairs = data.draw(st.lists(st.tuples(inner, inner), min_size=1, max_size=3))
    rows, targets = [sentence(x) for x, _ in pairs], [sentence(y) for _, y in pairs]
    tokens, target = batch(rows), batch(targets)
    for slots in SLOTS:
        wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
        assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)
    for cost, distance in (("indel", Indel), ("levenshtein", Levenshtein)):
        found = edit_distance(tokens, target, pad_id=PAD, cost=cost).tolist()
        assert found == [distance.distance(x, y) for x, y in zip(rows, targets, strict=True)]
