"""The demo on a few sentences: every number is there, and the picture and the page are what they claim to be."""

from __future__ import annotations

import csv

import pytest

from condgen_fast.cli import main
from condgen_fast.data import embedded
from condgen_fast.metrics.bleu import bleu
from condgen_fast.models.checkpoint import SHIPPED, load_model
from condgen_fast.recipes.demo import SYSTEMS


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    options = ["--sentences", "12", "--latency-sentences", "2", "--page-sentences", "2"]
    assert main(["demo", "--output", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert list(rows) == [system for system, _, _ in SYSTEMS]
    for system, row in rows.items():
        assert f"| {system}" in printed
        assert float(row["latency"]) > 0 and float(row["throughput"]) > 0 and 0 <= float(row["bleu"]) <= 100
    assert float(rows["beam 5"]["speedup"]) == 1
    for rounds in (1, 4, 10):
        assert 0 < float(rows[f"Mask-Predict T={rounds}"]["iterations"]) <= rounds
    assert (tmp_path / "quality-latency.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "refinement.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    assert page.count("Mask-Predict T=10") >= 2


@pytest.mark.parametrize("name", ["transformer-en-de", "cmlm-en-de", "levenshtein-en-de"])
def test_shipped_models_translate(name, tmp_path):
    """Greater than the words' own overlap: an untrained model, or one with a wrong vocabulary, has BLEU near 0."""
    source, reference = (lines[:40] for lines in embedded.load("test"))
    for file, lines in (("source", source), ("reference", reference)):
        (tmp_path / file).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    arguments = ["--model", name, "--input", str(tmp_path / "source"), "--output", str(tmp_path / "output")]
    assert main(["translate", *arguments]) == 0
    outputs = (tmp_path / "output").read_text(encoding="utf-8").splitlines()
    assert bleu(outputs, reference).score > 12


def test_shipped_weights_fit_their_size():
    assert sum(path.stat().st_size for path in SHIPPED.glob("*/model.safetensors")) < 24e6
    vocabularies = {load_model(path.name)[1].fingerprint for path in SHIPPED.glob("*-en-de")}
    assert len(vocabularies) == 1
