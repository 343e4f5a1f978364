"""Corpus BLEU, chrF and TER as sacrebleu computes them, each with the signature that makes a number comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF, TER


@dataclass(frozen=True)
class Score:
    """A corpus score, from 0 to 100 (TER may be more)."""

    name: str
    score: float
    signature: str
    """sacrebleu's: how the score was computed, version included"""

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f} ({self.signature})"


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> Score:
    """Corpus BLEU (Papineni 2002) of plain, detokenised text; one reference a line.

    `tokenize` is sacrebleu's: "13a" for most languages, "zh", "ja-mecab", "char", "intl", "none". No lines at all
    give 0; an empty hypothesis counts as one without matches.

    Equivalent to `sacrebleu.corpus_bleu(hypotheses, [references]).score`.
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(BLEU.TOKENIZERS)}; got {tokenize!r}")
    return _corpus_score("BLEU", BLEU(tokenize=tokenize), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, word_order: int = 0) -> Score:
    """Corpus chrF (Popović 2015): F-score of character n-grams; `word_order=2` gives chrF++.

    Equivalent to `sacrebleu.corpus_chrf(hypotheses, [references]).score`.
    """
    if word_order < 0:
        raise ValueError(f"word_order must be at least 0; got {word_order}")
    return _corpus_score("chrF" + "+" * word_order, CHRF(word_order=word_order), hypotheses, references)


def ter(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus translation edit rate (Snover 2006): edits, block shifts included, per 100 words of the reference;
    case is ignored.

    Equivalent to `sacrebleu.corpus_ter(hypotheses, [references]).score`.
    """
    return _corpus_score("TER", TER(), hypotheses, references)


def _corpus_score(name: str, metric: BLEU | CHRF | TER, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    for argument, value in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(value, str):
            raise TypeError(f"{argument} must be a list of str; got str")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses and references must have the same length; got {len(hypotheses)} and {len(references)}"
        )
    if not hypotheses:
        return Score(name, 0.0, "")
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Score(name, score, str(metric.get_signature()))
