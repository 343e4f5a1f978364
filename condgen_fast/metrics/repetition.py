"""Repeated tokens: how often a translation says a word twice in a row, the mark of tokens chosen independently."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def repeated_tokens(tokens: Sequence[Hashable]) -> int:
    """Tokens that equal the one before them: 2 in "a a a b"."""
    return sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))


def repeated_token_rate(rows: Sequence[Sequence[Hashable]]) -> float:
    """Share of all tokens of a corpus that equal the one before them in their row, in [0, 1]; 0 without tokens.

    Rows are words or ids. Reported per cent in the literature on non-autoregressive translation (Ghazvininejad 2019,
    table 4).
    """
    for row in rows:
        if isinstance(row, str):
            raise TypeError(f"rows must be lists of tokens; got the str {row[:40]!r}")
    count = sum(map(len, rows))
    return sum(map(repeated_tokens, rows)) / count if count else 0.0
