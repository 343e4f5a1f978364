"""Repeated tokens: how often a translation says a word twice in a row, the mark of tokens chosen independently."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from condgen_fast.metrics.words import NO_WORD, PAD, batches, impl
from condgen_fast.ops import AppliedEdits, apply_edits


def _without_repeats(tokens: Tensor) -> AppliedEdits:
    repeats = tokens == PAD  # which are not there to delete
    repeats[:, 1:] |= tokens[:, 1:] == tokens[:, :-1]
    return apply_edits(tokens, delete=repeats, pad_id=PAD, bos_id=NO_WORD, eos_id=NO_WORD, mask_id=NO_WORD, impl=impl())


def repeated_tokens(tokens: Sequence[Hashable]) -> int:
    """Tokens that equal the one before them: 2 in "a a a b"."""
    return repetitions([tokens])[0]


def repetitions(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """`repeated_tokens` of each row of words or ids."""
    counts = []
    for (tokens,) in batches(rows):
        counts += ((tokens != PAD).sum(1) - _without_repeats(tokens).lengths).tolist()
    return counts


def remove_repeats(rows: Sequence[Sequence[Hashable]]) -> list[list[Hashable]]:
    """The rows without tokens that equal the one before them, the usual repair of non-autoregressive output."""
    kept = []
    for (tokens,) in batches(rows):
        edited = _without_repeats(tokens)
        kept += [
            places[:length] for places, length in zip(edited.origin.tolist(), edited.lengths.tolist(), strict=True)
        ]
    return [[row[place] for place in places] for row, places in zip(rows, kept, strict=True)]


def repeated_token_rate(rows: Sequence[Sequence[Hashable]]) -> float:
    """Share of all tokens of a corpus that equal the one before them in their row, in [0, 1]; 0 without tokens.

    Rows are words or ids. Reported per cent in the literature on non-autoregressive translation (Ghazvininejad 2019,
    table 4).
    """
    repeated, count = sum(repetitions(rows)), sum(map(len, rows))
    return repeated / count if count else 0.0
