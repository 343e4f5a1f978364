"""Translate plain text with a trained model folder or a shipped model: one sentence in, one line out.

echo "Open the file." | condgen-fast translate --model levenshtein-en-de
condgen-fast translate --model runs/teacher --input test.en --output test.de --strategy beam --beam-size 5
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from condgen_fast.data.batching import windows
from condgen_fast.data.files import check_writable
from condgen_fast.data.text import iterate_lines, write_lines
from condgen_fast.models.checkpoint import load_model
from condgen_fast.recipes.evaluation import DecodingOptions, translate_lines
from condgen_fast.recipes.training import choose_device


@dataclass(kw_only=True)
class Translate(DecodingOptions):
    """Translate text, one sentence a line."""

    model: str
    """a shipped model's name (transformer-en-de, cmlm-en-de, levenshtein-en-de) or a model folder"""
    input: str = "-"
    """text file, one sentence a line; - is standard input"""
    output: str = "-"
    """where the translations go; - is standard output"""
    max_tokens: int = 4096
    """padded source tokens decoded at a time"""
    window: int = 20_000
    """lines held at a time: they are sorted by length for decoding, and come out in their own order"""
    truncate: bool = False
    """leave out the end of a line that is longer than the model's positions, instead of stopping"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


def main(options: Translate) -> None:
    if options.output != "-":
        check_writable(options.output)  # before the work, not after it
    model, vocabulary = load_model(options.model, device=choose_device(options.device))
    strategy, choices = options.strategy_for(model)

    def translations() -> Iterator[str]:
        first = 1
        for lines in windows(iterate_lines(options.input), options.window):
            yield from translate_lines(
                model, vocabulary, lines, strategy, max_tokens=options.max_tokens, truncate=options.truncate,
                progress=sys.stderr.isatty(), first=first, **choices,
            )  # fmt: skip
            first += len(lines)

    write_lines(options.output, translations())
