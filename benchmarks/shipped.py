"""The shipped models, and sentences of the embedded test set for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from condgen_fast.data import embedded
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.models.checkpoint import load_model


@cache
def shipped(name: str, device: str) -> tuple[Any, Vocabulary]:
    """A model and its vocabulary; skips the benchmark where its weights are not there."""
    try:
        return load_model(name, device=device)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def sources(name: str, device: str, count: int) -> list[list[int]]:
    """Ids of so many sentences with their eos, evenly from the shortest to the longest of the test set."""
    model, vocabulary = shipped(name, device)
    lines = sorted(embedded.load("test")[0], key=len)
    chosen = [lines[len(lines) * (2 * i + 1) // (2 * count)] for i in range(count)]
    return [[*ids, model.eos_id] for ids in vocabulary.encode(chosen)]
