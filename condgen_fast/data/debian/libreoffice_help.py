"""LibreOffice help (MPL-2.0): pages whose paragraphs carry the same ids in every language."""

from __future__ import annotations

import collections
import html
import os
import re
from collections.abc import Iterator, Sequence

from condgen_fast.data.debian import Unit
from condgen_fast.data.debian.packages import Packages

LANGUAGES = {"en": ("en-us", "en-US"), "de": ("de", "de"), "es": ("es", "es"), "fr": ("fr", "fr"), "it": ("it", "it")}
"""language -> (end of the package's name, folder of the pages)"""
PARAGRAPH = re.compile(r'<(h[1-6]|p)\b[^>]*?\bid="([^"]+)"[^>]*>(.*?)</\1>', re.S)


def package(language: str) -> str:
    """Name of the package with the help in a language."""
    return f"libreoffice-help-{LANGUAGES[language][0]}"


def units(packages: Packages, languages: Sequence[str]) -> Iterator[Unit]:
    """Headings and paragraphs; "en" must be among the languages."""
    paragraphs = {language: _paragraphs(packages, language) for language in languages}
    for key in sorted(paragraphs["en"]):
        text = {language: p[key] for language, p in paragraphs.items() if key in p}
        yield Unit("lo", f"lo:{key[0]}", text)


def _paragraphs(packages: Packages, language: str) -> dict[tuple[str, str, int], str]:
    """(page, id of the paragraph, how often the id has come on the page) -> text."""
    base = packages.root / package(language) / "usr/share/libreoffice/help" / LANGUAGES[language][1] / "text"
    if not base.is_dir():
        raise FileNotFoundError(f"package {package(language)} has no folder {base}")
    found = {}
    for folder, _, files in os.walk(base):
        for file in files:
            if not file.endswith(".html"):
                continue
            path = os.path.join(folder, file)
            with open(path, encoding="utf-8") as page:
                text = page.read()
            count = collections.Counter()
            for match in PARAGRAPH.finditer(text, max(0, text.find('id="DisplayArea"'))):
                identifier, content = match[2], match[3]
                count[identifier] += 1
                if "switchinline" not in content:  # alternatives for several systems mixed in one paragraph
                    found[os.path.relpath(path, base), identifier, count[identifier]] = _plain(content)
    return found


def _plain(content: str) -> str:
    """A paragraph's text without its markup; marked-up words that touch their neighbours are set apart."""
    content = re.sub(r"(?<=\w)(<(?:span|a|em|strong)\b)", r" \1", content)
    content = re.sub(r"(</(?:span|a|em|strong)>)(?=\w)", r"\1 ", content)
    return html.unescape(re.sub(r"<[^>]+>", "", content))
