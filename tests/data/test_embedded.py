"""The corpus inside the package."""

from __future__ import annotations

from importlib.resources import files

import pytest

from condgen_fast.data import embedded
from condgen_fast.data.sentences import normalise


@pytest.mark.parametrize(("split", "size"), [("train", 6000), ("valid", 365), ("test", 361)])
def test_sizes_and_clean_lines(split, size):
    english, german = embedded.load(split)
    assert len(english) == len(german) == size
    assert all(line == line.strip() and line for line in english + german)


def test_nothing_held_out_is_in_the_training_text():
    for side in (0, 1):
        train = {normalise(line) for line in embedded.load("train")[side]}
        for split in ("valid", "test"):
            assert not train & {normalise(line) for line in embedded.load(split)[side]}


def test_the_licence_comes_with_the_text():
    folder = files("condgen_fast.data.embedded")
    assert "Mozilla Public License, v. 2.0" in (folder / "NOTICE").read_text(encoding="utf-8")
    assert "Mozilla Public License Version 2.0" in (folder / "LICENSE.MPL-2.0").read_text(encoding="utf-8")


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, valid, test; got 'dev'"):
        embedded.load("dev")
