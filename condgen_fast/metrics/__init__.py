"""Measures of generated text."""

from condgen_fast.metrics.bleu import Score, bleu, chrf, ter
from condgen_fast.metrics.repetition import repeated_token_rate, repeated_tokens

__all__ = ["Score", "bleu", "chrf", "repeated_token_rate", "repeated_tokens", "ter"]
