"""Score a model, or a file of translations, on a test set.

  condgen-fast evaluate --model runs/teacher --source test.en --reference test.de --strategy beam
  condgen-fast evaluate --hypotheses test.out --reference test.de

BLEU, chrF, TER   score of the whole set, and its signature (sacrebleu)
edits             words to insert, delete or replace per 100 words of the references, of the whole set (TER without
                  block shifts, but with case); then the median of the sentences' own rates, and how many need no edit
repeated tokens   share of words that repeat the word before them
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from condgen_fast.data.text import read_parallel
from condgen_fast.metrics.bleu import bleu, chrf, ter
from condgen_fast.metrics.edit_rate import corpus_edit_rate, edit_rates
from condgen_fast.metrics.repetition import repeated_token_rate
from condgen_fast.models.checkpoint import load_model
from condgen_fast.recipes.evaluation import DecodingOptions, translate_lines
from condgen_fast.recipes.training import choose_device


@dataclass(kw_only=True)
class Evaluate(DecodingOptions):
    """Score translations against references: BLEU, chrF, TER, word edit rates, repeated words."""

    reference: Path
    """reference translations, one a line"""
    model: str | None = None
    """shipped model's name or model folder that translates `source`"""
    source: Path | None = None
    """source text, one sentence a line"""
    hypotheses: Path | None = None
    """translations to score instead of a model's"""
    max_tokens: int = 4096
    """padded source tokens decoded at a time"""
    truncate: bool = False
    """leave out the end of a line that is longer than the model's positions, instead of stopping"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


def main(options: Evaluate) -> None:
    if (options.model is None) == (options.hypotheses is None):
        raise ValueError("evaluate needs either --model with --source, or --hypotheses")
    if options.hypotheses is not None:
        outputs, references = read_parallel(options.hypotheses, options.reference)
    else:
        if options.source is None:
            raise ValueError("source must be given with a model; got none")
        device = choose_device(options.device)
        model, vocabulary = load_model(options.model, device=device)
        sources, references = read_parallel(options.source, options.reference)
        strategy, choices = options.strategy_for(model)
        outputs = translate_lines(
            model, vocabulary, sources, strategy, max_tokens=options.max_tokens, truncate=options.truncate,
            progress=sys.stderr.isatty(), **choices,
        )  # fmt: skip
    for score in (bleu(outputs, references), chrf(outputs, references), ter(outputs, references)):
        print(f"{score.name:<5} {score.score:6.2f}   {score.signature}")
    words = [line.split() for line in outputs]
    of_references = [line.split() for line in references]
    rates = edit_rates(words, of_references)
    print(
        f"edits {corpus_edit_rate(words, of_references):6.2f}   sentences: median {median(rates or [0]):.2f},"
        f" {100 * rates.count(0) / max(len(rates), 1):.1f} % need none"
    )
    print(f"repeated tokens {100 * repeated_token_rate(words):.2f} %")
