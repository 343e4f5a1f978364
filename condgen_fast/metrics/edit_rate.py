"""Word edit rates: what post-editors would change, and how far two systems lie apart."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from condgen_fast.metrics.words import PAD, batches, impl
from condgen_fast.ops import edit_distance


def edit_rates(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> list[float]:
    """Insertions, deletions and substitutions per 100 words of the reference, for each sentence.

    Rows are words or ids. This is TER (Snover 2006) without block shifts, so word error rate, and bounds TER from
    above; `ter` has the shifts and is for corpora. Against an empty reference a hypothesis that is not empty has 100.

    Equivalent to `100 * rapidfuzz.distance.Levenshtein.distance(hypothesis, reference) / len(reference)`.
    """
    return [_rate(*pair) for pair in zip(_edits(hypotheses, references), map(len, references), strict=True)]


def corpus_edit_rate(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> float:
    """The edits of `edit_rates` of all sentences together per 100 words of all references (word error rate)."""
    return _rate(sum(_edits(hypotheses, references)), sum(map(len, references)))


def _edits(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> list[int]:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses and references must have the same length; got {len(hypotheses)} and {len(references)}"
        )
    edits = []
    for a, b in batches(hypotheses, references):
        edits += edit_distance(a, b, pad_id=PAD, impl=impl()).tolist()
    return edits


def _rate(edits: int, words: int) -> float:
    return 100 * edits / words if words > 0 else 100.0 * (edits > 0)
