"""From pieces of text in several languages to clean, line-aligned sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|z\. ?b|d\. ?h|u\. ?a|p\. ?ex|p\. ?ej|ad es|f\.eks|etc|bzw|usw|vs|cf|ca|evtl|ggf|inkl|bl\.a|"
    r"approx|nr|no|dr|mr|mrs|st|fig|vol|resp|sog|inc|ltd|jr|al|n\.b|a\.k\.a|[a-z])\.|\.\.\.)$",
    re.I,
)
BOUNDARY = re.compile(r"""(?<=[.!?])["'»”’)\]]*\s+(?=["'«“„(\[¿¡]*[A-ZÀ-ÞŒ0-9])""")


class Row(NamedTuple):
    """One sentence in every language of a task."""

    source: str
    group: str
    text: tuple[str, ...]
    """English (or the task's own source side) first"""


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, by punctuation and a list of abbreviations."""
    sentences, start = [], 0
    for match in BOUNDARY.finditer(text):
        if not ABBREVIATION.search(text[start : match.start()]):
            sentences.append(text[start : match.end()].strip())
            start = match.end()
    sentences.append(text[start:].strip())
    return [s for s in sentences if s]


def tidy(text: str) -> str:
    """Text with plain single spaces, without soft hyphens and zero-width spaces."""
    text = text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u00ad", "").replace("\u200b", "")
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """What two sentences share when they count as the same: lower-case words, every number a 0."""
    return " ".join(re.sub(r"\d+", "0", word) for word in re.findall(r"\w+", text.lower()))


def is_translation(english: str, other: str) -> bool:
    """Whether a pair looks like prose and its translation: its lengths, letters, and how much is left in English."""
    words, other_words = len(english.split()), len(other.split())
    if not (3 <= words <= 80 and 1 <= other_words <= 100):
        return False
    if english == other or max(words, other_words) > 3 * min(words, other_words) + 3:
        return False
    for text in (english, other):
        if sum(c.isalpha() or c == " " for c in text) < 0.7 * len(text):  # code, formulas, tables
            return False
    shared = set(normalise(english).split())
    return len(shared & set(normalise(other).split())) <= 0.6 * max(1, len(shared))


def aligned_rows(units: Iterable[tuple[str, str, dict[str, str]]], languages: Sequence[str]) -> list[Row]:
    """One row a sentence, where every language splits alike, else one a unit; the first language is unique.

    Units that lack a language are passed over; of rows alike in the normalised first language the first is kept.
    """
    rows: dict[str, Row] = {}
    for source, group, text in units:
        if not all(text.get(language) for language in languages):
            continue
        tidied = [tidy(text[language]) for language in languages]
        sentences = [split_sentences(t) for t in tidied]
        if len({len(s) for s in sentences}) > 1:
            sentences = [[t] for t in tidied]
        for row in zip(*sentences, strict=True):
            if all(is_translation(row[0], other) for other in row[1:]):
                rows.setdefault(normalise(row[0]), Row(source, group, row))
    return list(rows.values())
