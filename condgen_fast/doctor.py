"""What is installed, what was built, and which implementation each op takes here."""

from __future__ import annotations


def report() -> str:
    return ""
