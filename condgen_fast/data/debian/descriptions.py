"""Debian package descriptions and their translations (Debian Description Translation Project).

The translations state no licence: they may be used, and are not to be passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from condgen_fast.data.debian import Unit
from condgen_fast.data.debian.packages import Packages
from condgen_fast.data.sentences import normalise, tidy

STANZA = re.compile(r"^Package: (\S+)\nDescription-md5: (\w+)\nDescription-\w+: (.*)\n((?: .*\n?)*)", re.M)
BULLET = re.compile(r"\s*(?:[*+•·o–-]|\d{1,2}[.)])\s+(.*)")
CONJUNCTION = re.compile(r"(und|oder|bzw|bis|og|eller|and|or|e|o|et|ou)\b")


class Description(NamedTuple):
    package: str
    synopsis: str
    body: str


class Descriptions(NamedTuple):
    """All descriptions: language -> checksum of the English text -> description; and package -> source package."""

    by_language: dict[str, dict[str, Description]]
    source_package: dict[str, str]

    def group(self, package: str) -> str:
        """The source package, whose packages share much of their descriptions."""
        return "ddtp:" + self.source_package.get(package, package)


def read(packages: Packages, languages: Sequence[str]) -> Descriptions:
    """Descriptions in these languages from the package indexes."""
    source_package = {}
    for stanza in packages.index("*_main_binary-*_Packages*").split("\n\n"):
        package = re.search(r"^Package: (\S+)", stanza, re.M)
        source = re.search(r"^Source: (\S+)", stanza, re.M)
        if package:
            source_package[package[1]] = source[1] if source else package[1]
    by_language = {}
    for language in languages:
        found = by_language[language] = {}
        for stanza in packages.index(f"*_i18n_Translation-{language}*").split("\n\n"):
            if match := STANZA.search(stanza + "\n"):
                package, checksum, synopsis, body = match.groups()
                found[checksum] = Description(package, synopsis.strip(), body)
    return Descriptions(by_language, source_package)


def units(descriptions: Descriptions) -> Iterator[Unit]:
    """Synopses, and paragraphs and bullet items where a translation has as many of them as the English."""
    english = descriptions.by_language["en"]
    others = {language: d for language, d in descriptions.by_language.items() if language != "en"}
    for checksum, (package, synopsis, body) in english.items():
        translations = {language: d[checksum] for language, d in others.items() if checksum in d}
        if not translations:
            continue
        group = descriptions.group(package)
        yield Unit("ddtp", group, {language: t.synopsis for language, t in translations.items()} | {"en": synopsis})
        parts = paragraphs(body)
        translated = {language: paragraphs(t.body) for language, t in translations.items()}
        translated = {language: p for language, p in translated.items() if len(p) == len(parts)}
        for i, part in enumerate(parts):
            text = {language: p[i] for language, p in translated.items() if p[i]}
            if part and text:
                yield Unit("ddtp", group, text | {"en": part})


def headlines(descriptions: Descriptions) -> Iterator[Unit]:
    """Whole English descriptions ("src") with their one-line synopses ("tgt")."""
    seen = set()
    for _, (package, synopsis, body) in sorted(descriptions.by_language["en"].items()):
        if re.search(r"transitional|dummy|metapackage", synopsis + body[:200], re.I):
            continue
        text = tidy(" ".join(part for part in paragraphs(body) if part))
        key = normalise(text)
        if 15 <= len(text.split()) <= 300 and 3 <= len(synopsis.split()) <= 20 and key not in seen:
            seen.add(key)
            yield Unit("ddtp", descriptions.group(package), {"src": text, "tgt": tidy(synopsis)})


def paragraphs(body: str) -> list[str | None]:
    """Paragraphs and bullet items of a long description, in order; None stands for a block of verbatim lines."""
    parts: list[str | None] = []
    lines: list[str] = []
    verbatim = bullet = False

    def finish() -> None:
        nonlocal lines, verbatim
        if lines:
            parts.append(None if verbatim else _join(lines))
        lines, verbatim = [], False

    for line in body.split("\n"):
        if not line.strip():
            continue
        if line.strip() == ".":
            finish()
            continue
        line = line[1:]
        if match := BULLET.match(line):
            finish()
            lines, bullet = [match[1]], True
            continue
        if line[:1].isspace() and not (lines and bullet):
            verbatim = True
        if not lines:
            bullet = False
        lines.append(line)
    finish()
    return parts


def _join(lines: list[str]) -> str:
    """Lines as one; a word divided at its own hyphen is put together again: "SIP-Client-" + "Software"."""
    text = ""
    for line in lines:
        line = line.strip()
        if re.search(r"\w-$", text) and re.match(r"\w", line) and not CONJUNCTION.match(line):
            text += line
        else:
            text += (" " if text else "") + line
    return text
