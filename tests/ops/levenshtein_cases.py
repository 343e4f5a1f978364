"""Sentences for the tests of the levenshtein family."""

from __future__ import annotations

import torch

PAD, BOS, EOS, MASK = 0, 1, 2, 3
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "mask_id": MASK}
IMPLS = ("auto", "reference")
SLOTS = ("kept", "source")
DTYPES = (torch.int64, torch.int32)
WORDS = "abcdefghijklmnopqrstuvwxyz"


def batch(rows, *, width=None, device="cpu", dtype=torch.int64):
    width = max((len(row) for row in rows), default=0) if width is None else width
    padded = [row + [PAD] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)


def sentence(inner):
    return [BOS, *inner, EOS]


def ids(word):
    return [10 + WORDS.index(letter) for letter in word]


def assert_equal(found, wanted, rows, targets):
    for field, value, reference in zip(found._fields, found, wanted, strict=True):
        assert value.dtype == reference.dtype, field
        wrong = (value != reference).reshape(len(rows), -1).any(1).nonzero()
        if len(wrong):
            b = int(wrong[0])
            raise AssertionError(f"{field} of {rows[b]} -> {targets[b]}: {value[b]} instead of {reference[b]}")


def applied(row, target, delete, insert, masked, slots):
    """What the labels make of a row, without apply_edits."""
    missing = iter([token for token, is_missing in zip(target, masked, strict=False) if is_missing])
    counts = iter(insert)
    out = []
    for token, is_deleted in zip(row, delete, strict=False):
        out += [] if is_deleted else [token]
        if slots == "source" or not is_deleted:
            out += [next(missing) for _ in range(next(counts, 0))]
    assert next(missing, None) is None and not any(counts)
    return out


def random_pairs(count, generator):
    """Sentences of many lengths and alphabets, two thirds of them edited copies, some of them subsequences."""
    rows, targets = [], []
    for n in range(count):
        alphabet = generator.choice((1, 2, 3, 10, 100, 30000))
        longest = generator.choice((2, 8, 30, 66, 130, 260))
        draw = lambda alphabet=alphabet: 10 + generator.randrange(alphabet)  # noqa: E731
        y = [draw() for _ in range(generator.randrange(longest))]
        if n % 3 == 0:
            x = [draw() for _ in range(generator.randrange(longest))]
        else:
            x = [token for token in y if generator.random() < 0.8]
            if n % 3 == 1:
                x = [new for token in x for new in ([token] if generator.random() < 0.8 else [draw(), token])]
        rows.append(sentence(x))
        targets.append(sentence(y))
    return rows, targets
