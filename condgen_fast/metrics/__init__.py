"""Measures of generated text."""

from condgen_fast.metrics.bleu import Score, bleu, chrf, ter
from condgen_fast.metrics.edit_rate import corpus_edit_rate, edit_rates
from condgen_fast.metrics.repetition import remove_repeats, repeated_token_rate, repeated_tokens, repetitions

__all__ = [
    "Score",
    "bleu",
    "chrf",
    "corpus_edit_rate",
    "edit_rates",
    "remove_repeats",
    "repeated_token_rate",
    "repeated_tokens",
    "repetitions",
    "ter",
]
