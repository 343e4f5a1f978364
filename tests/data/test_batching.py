"""Padding, batches by token count and encoded data sets."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen_fast.data.batching import ParallelDataset, TokenRows, pad_sequences, token_batches, windows


class Letters:
    """A vocabulary of characters."""

    pad_id, bos_id, eos_id = 0, 2, 3

    def encode(self, lines):
        return [[ord(c) for c in line] for line in lines]


def test_pad_sequences():
    padded = pad_sequences([[5, 6], [], [7]], 9)
    assert padded.dtype == torch.int64 and padded.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert pad_sequences([], 0).shape == (0, 0) and pad_sequences([[], []], 0).shape == (2, 0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1))))
def test_token_rows_are_the_lists(rows):
    stored = TokenRows(rows)
    assert list(stored) == rows and len(stored) == len(rows) and stored.lengths.tolist() == [len(r) for r in rows]
    assert list(TokenRows.concatenate([stored, TokenRows(), stored])) == rows + rows
    with pytest.raises(IndexError):
        stored[len(rows)]
    if rows:
        assert stored[-1] == rows[-1]


def test_batch():
    data = ParallelDataset([[5, 6, 7], [8]], [[9], [10, 11]])
    assert data.source_lengths.tolist() == [4, 2] and data.target_lengths.tolist() == [3, 4]
    batch = data.batch([1, 0])
    assert batch.source.tolist() == [[8, 3, 0, 0], [5, 6, 7, 3]] and batch.source_lengths.tolist() == [2, 4]
    assert batch.target.tolist() == [[2, 10, 11, 3], [2, 9, 3, 0]] and batch.target_lengths.tolist() == [4, 3]
    assert batch.indices.tolist() == [1, 0]
    assert batch.to("cpu").target is batch.target
    assert data.batch([]).source.shape == (0, 0)


def test_encode_leaves_out_empty_and_long_pairs_and_says_so(caplog):
    source = ["abc", "", "x", "toolong", "fits"]
    target = ["a", "y", "", "b", "toolong"]
    with caplog.at_level(logging.WARNING):
        data = ParallelDataset.encode(source, target, Letters(), max_length=5)
    assert len(data) == 1 and data.source[0] == [97, 98, 99] and data.target[0] == [97]
    assert "4 of 5 pairs left out: 2 with an empty side, 2 with more than 5 tokens" in caplog.text


def test_max_length_counts_eos():
    lengths = [len(ParallelDataset.encode(["abcd"], ["a"], Letters(), max_length=n)) for n in (4, 5)]
    assert lengths == [0, 1]
    assert len(ParallelDataset.encode(["x" * 10_000], ["a"], Letters())) == 1


def test_encode_in_parts_keeps_the_order():
    lines = [chr(97 + i % 26) * (1 + i % 3) for i in range(25_000)]
    data = ParallelDataset.encode(lines, lines, Letters())
    assert len(data) == len(lines)
    for i in (0, 9_999, 10_000, 20_001, 24_999):
        assert data.source[i] == data.target[i] == [ord(c) for c in lines[i]]


def test_unequal_sides():
    with pytest.raises(ValueError, match="same length; got 1 and 2"):
        ParallelDataset([[1]], [[1], [2]])
    with pytest.raises(ValueError, match="same length; got 1 and 2"):
        ParallelDataset.encode(["a"], ["a", "b"], Letters())


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_token_batches(pairs, max_tokens, seed, epoch, world_size, shuffle):
    source, target = (np.array([p[side] for p in pairs], dtype=np.int64) for side in (0, 1))

    def plan(rank: int) -> list[list[int]]:
        return token_batches(
            source, target, max_tokens=max_tokens, seed=seed, epoch=epoch, shuffle=shuffle,
            rank=rank, world_size=world_size,
        )  # fmt: skip

    plans = [plan(rank) for rank in range(world_size)]
    assert plans == [plan(rank) for rank in range(world_size)]
    assert len({len(p) for p in plans}) == 1
    batches = [batch for p in plans for batch in p]
    for batch in batches:
        assert batch and (len(batch) * max(source[batch].max(), target[batch].max()) <= max_tokens or len(batch) == 1)
    distinct = {tuple(batch) for batch in batches}
    assert sorted(i for batch in distinct for i in batch) == list(range(len(pairs)))
    if len(distinct) >= world_size:
        assert len(batches) - len(distinct) < world_size


def test_epochs_and_seeds_differ_and_order_is_shuffled():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    plans = [
        token_batches(lengths, lengths, max_tokens=300, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]
    assert {frozenset(b) for b in plans[0]} != {frozenset(b) for b in plans[1]}  # not only another order of batches
    longest = [lengths[batch].max() for batch in plans[0]]
    assert longest != sorted(longest)
    ordered = token_batches(lengths, lengths, max_tokens=300, seed=0, epoch=0, shuffle=False)
    longest = [lengths[batch].max() for batch in ordered]
    assert longest == sorted(longest)


def test_little_is_padding():
    random = np.random.default_rng(1)
    source = random.integers(2, 80, 5000)
    target = np.maximum(2, source + random.integers(-3, 4, 5000))
    plan = token_batches(source, target, max_tokens=4000, seed=0, epoch=0)
    padded = sum(len(b) * max(source[b].max(), target[b].max()) for b in plan)
    assert np.maximum(source, target).sum() / padded > 0.93
    assert padded / len(plan) > 0.95 * 4000


def test_fewer_batches_than_ranks():
    plans = [token_batches([3], [3], max_tokens=9, seed=0, epoch=0, rank=r, world_size=3) for r in range(3)]
    assert plans == [[[0]]] * 3
    assert token_batches([], [], max_tokens=9, seed=0, epoch=0, world_size=2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\); got 2"),
        ({"target_lengths": [1]}, r"must have the same shape \[N\]; got \[2\] and \[1\]"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"source_lengths": [1, 2], "target_lengths": [1, 2], "max_tokens": 8, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match=message):
        token_batches(**(arguments | changes))


def test_windows_are_consecutive_and_lazy():
    def numbers():
        for i in range(5):
            taken.append(i)
            yield i

    taken = []
    parts = windows(numbers(), 2)
    assert next(parts) == [0, 1] and taken == [0, 1]
    assert list(parts) == [[2, 3], [4]] and list(windows([], 3)) == []
    with pytest.raises(ValueError, match="size must be >= 1"):
        next(windows([1], 0))
