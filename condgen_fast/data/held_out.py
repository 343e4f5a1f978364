"""Splitting a corpus so that nothing of the held-out text, nor anything close to it, is in the training text."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from condgen_fast.data.sentences import Row, normalise

SHARE = 0.04
"""of the groups, by hash, that go to each held-out split"""
TEMPLATE = 5
"""a held-out sentence with more near duplicates than this in the training text is a template, and left out itself"""

Gram = tuple[str, ...]


class Split(NamedTuple):
    """Rows of the three splits, and how many were dropped for being close to one another."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    near_duplicates: int
    templates: int


def split(rows: Sequence[Row], held: int) -> Split:
    """At most `held` rows each for validation and test; whole groups are held out, the same ones in every task.

    A training row that shares half of its 4-grams with a held-out one, or its normalised text in any language, is
    dropped, and so is a validation row that is as close to a test row.
    """
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    parts: dict[str, list[Row]] = {"test": [], "valid": [], "train": []}
    for group in sorted(groups, key=_group_hash):
        place = _group_hash(group) / 2.0**32
        parts["test" if place < SHARE else "valid" if place < 2 * SHARE else "train"] += groups[group]
    candidates = {name: sorted(parts[name], key=_text_hash)[: held * 3 // 2] for name in ("test", "valid")}

    names = ["test"] * len(candidates["test"]) + ["valid"] * len(candidates["valid"])
    rows_held = candidates["test"] + candidates["valid"]
    index = _NearDuplicates(rows_held)
    near = collections.defaultdict(list)  # held-out row -> training rows close to it
    for j, row in enumerate(parts["train"]):
        for i in index.find(row):
            near[i].append(j)
    templates = {i for i in near if len(near[i]) > TEMPLATE}
    dropped = {j for i in near if i not in templates for j in near[i]}
    kept = [(name, row) for i, (name, row) in enumerate(zip(names, rows_held, strict=True)) if i not in templates]
    texts = [{normalise(row.text[side]) for _, row in kept} for side in range(len(rows[0].text) if rows else 0)]

    train = [
        row
        for j, row in enumerate(parts["train"])
        if j not in dropped and not any(normalise(t) in texts[side] for side, t in enumerate(row.text))
    ]
    test = [row for name, row in kept if name == "test"][:held]
    valid = [row for name, row in kept if name == "valid"][:held]
    close_to_test = _NearDuplicates(test)
    valid = [row for row in valid if not close_to_test.find(row)]
    return Split(sorted(train, key=_text_hash), valid, test, len(dropped), len(templates))


class _NearDuplicates:
    """An index of rows by the 4-grams of their first side."""

    def __init__(self, rows: Sequence[Row]):
        self.grams = [_grams(row.text[0]) for row in rows]
        self.rows_with = collections.defaultdict(list)
        for i, grams in enumerate(self.grams):
            for gram in grams:
                self.rows_with[gram].append(i)

    def find(self, row: Row) -> list[int]:
        """Places of the rows that share with this one at least half the 4-grams of the shorter of the two."""
        grams = _grams(row.text[0])
        shared = collections.Counter(i for gram in grams for i in self.rows_with.get(gram, ()))
        return [i for i, count in shared.items() if count >= 0.5 * min(len(grams), len(self.grams[i]))]


def _grams(text: str, n: int = 4) -> set[Gram]:
    words = normalise(text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _group_hash(group: str) -> int:
    return int(hashlib.sha1(group.encode()).hexdigest()[:8], 16)


def _text_hash(row: Row) -> bytes:
    return hashlib.sha1(row.text[0].encode()).digest()
