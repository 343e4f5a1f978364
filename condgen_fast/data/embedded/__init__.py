"""LibreOffice help, English and German: a small parallel corpus inside the package (MPL-2.0, see NOTICE)."""

from __future__ import annotations

from importlib.resources import files

SPLITS = ("train", "valid", "test")


def load(split: str) -> tuple[list[str], list[str]]:
    """English and German sentences of a split, line-aligned: 6,000 "train", 365 "valid" or 361 "test" pairs."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    folder = files(__name__)
    english, german = (
        (folder / f"{split}.{language}").read_text(encoding="utf-8").split("\n")[:-1] for language in ("en", "de")
    )
    return english, german
