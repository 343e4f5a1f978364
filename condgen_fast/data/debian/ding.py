"""The Ding dictionary German–English (GPL-2+): the entries that are whole sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

from condgen_fast.data.debian import Unit
from condgen_fast.data.debian.packages import Packages

PACKAGE = "trans-de-en"
NOT_TEXT = re.compile(r"\b(etc|sb|sth|jdn|jdm|jds|etw|usw)\.$|/")
"""placeholders ("give sb. sth.") and alternatives"""


def units(packages: Packages) -> Iterator[Unit]:
    """Example sentences of at least three English words."""
    path = packages.root / PACKAGE / "usr/share/trans/de-en"
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if line.startswith("#") or "::" not in line:
                continue
            german, english = (side.split("|") for side in line.rstrip("\n").split("::", 1))
            if len(german) != len(english):
                continue
            for de, en in zip(map(_clean, german), map(_clean, english), strict=True):
                ended = re.search(r"[.!?]$", de) and re.search(r"[.!?]$", en)
                if ended and len(en.split()) >= 3 and not NOT_TEXT.search(f"{de} {en}"):
                    yield Unit("ding", f"ding:{number}", {"en": en, "de": de})


def _clean(text: str) -> str:
    """An entry without its notes, cut at the first alternative."""
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|<[^>]*>|/[^/]*/$", "", text)
    text = re.split(r"\s*;\s*", text)[0]
    return re.sub(r"\s*\([^)]*\)\s*", " ", text).strip()
