"""Readers of the text that Debian packages carry; each yields `Unit`s, pieces of text said in several languages."""

from __future__ import annotations

from typing import NamedTuple


class Unit(NamedTuple):
    """A paragraph or phrase in some languages."""

    source: str
    """where it is from: "lo" (LibreOffice help), "ddtp" (package descriptions) or "ding" (dictionary)"""
    group: str
    """the help page, source package or entry it belongs to: what is held out together"""
    text: dict[str, str]
    """language code -> text"""
