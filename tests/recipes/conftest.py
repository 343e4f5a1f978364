"""A toy language pair, small enough that a recipe trains in seconds: every word is translated by its upper case."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = ["open", "the", "file", "close", "a", "window", "save", "new", "old", "menu", "click", "table", "text", "row"]
MODEL = ["--width", "16", "--feed-forward", "32", "--encoder-layers", "1", "--decoder-layers", "1", "--heads", "2"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder with train.src … valid.trg: 200 and 20 line-aligned pairs."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for split, size in (("train", 200), ("valid", 20)):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 7))) for _ in range(size)]
        (folder / f"{split}.src").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (folder / f"{split}.trg").write_text("".join(line.upper() + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def train_arguments(corpus):
    """Command line of a short training run: train_arguments("transformer", output, updates=6, …)."""

    def arguments(kind: str, output: Path, **more: object) -> list[str]:
        options = {
            "source": corpus / "train.src", "target": corpus / "train.trg", "valid-source": corpus / "valid.src",
            "valid-target": corpus / "valid.trg", "output": output, "vocabulary-size": 60, "max-tokens": 200,
            "updates": 6, "save-every": 2, "warmup": 4, "learning-rate": 0.01, "average": 2, "device": "cpu",
        } | {name.replace("_", "-"): value for name, value in more.items()}  # fmt: skip
        return ["train", kind, *MODEL, *(str(x) for name, value in options.items() for x in (f"--{name}", value))]

    return arguments
