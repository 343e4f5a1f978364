"""Words as token ids, for the metrics that are ops on tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from condgen_fast import _library
from condgen_fast.data.batching import pad_sequences

PAD, NO_WORD = 0, -1  # words are 1, 2, ...
_ROWS = 256  # in a batch, so that one long line does not make all others as long


def impl() -> str:
    """Metrics also work where nothing is compiled."""
    return "auto" if _library.load() else "reference"


def batches(*corpora: Sequence[Sequence[Hashable]]) -> Iterator[tuple[Tensor, ...]]:
    """Corpora of as many rows of words each -> tensors of ids [B, T], right-padded; equal words have equal ids."""
    for corpus in corpora:
        for row in corpus:
            if isinstance(row, str):
                raise TypeError(f"rows must be lists of tokens; got the str {row[:40]!r}")
    ids: dict[Hashable, int] = {}
    for first in range(0, len(corpora[0]), _ROWS):
        yield tuple(
            pad_sequences(
                [[ids.setdefault(w, len(ids) + 1) for w in row] for row in corpus[first : first + _ROWS]], PAD
            )
            for corpus in corpora
        )
