"""The show command: text and models in, one page out; its options, and text that looks like HTML."""

from __future__ import annotations

import re

import pytest
import torch

from condgen_fast.cli import main
from condgen_fast.models.checkpoint import load_model, save_model
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig
from condgen_fast.recipes.show import Show, parse, planned

MODELS = ["transformer-en-de", "cmlm-en-de", "levenshtein-en-de"]


def shown(tmp_path, *arguments):
    assert main(["show", "--output", str(tmp_path / "page.html"), *arguments]) == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_every_strategy_of_the_shipped_models_side_by_side(tmp_path, capsys):
    strategies = ["beam:beam_size=2", "greedy", "sample:seed=1", "mask_predict:iterations=2", "refine", "levenshtein",
                  "insert:mode=sequential,max_iterations=3"]  # fmt: skip
    page = shown(tmp_path, "--models", *MODELS, "--strategies", *strategies, "--sentences", "2")
    assert page.count('<section class="example">') == 2 and page.count('<article class="run">') == 14
    assert "2 sentences, 7 strategies" in capsys.readouterr().out
    for name in ("beam", "greedy", "sample", "mask_predict", "refine", "levenshtein", "insert"):
        assert page.count(f"<h3>{name} ") == 2
    assert page.count("cmlm-en-de · iterations=2") == 2
    assert page.count("levenshtein-en-de · mode=sequential, max_iterations=3") == 2
    assert page.count("<h3>mask_predict <small>2 rounds</small>") == 2
    assert not re.search(r"https?:|@import|url\(|<link|src=", page)


def test_by_default_each_model_shows_its_own_strategy_on_embedded_sentences(tmp_path):
    page = shown(tmp_path)
    assert re.findall(r"<h3>(\w+) ", page) == ["beam", "mask_predict", "levenshtein"] * 3
    assert "To start a slide show from the current slide, press Shift+F5." in page
    assert page.count("<b>Reference</b>") == 3


def test_text_is_escaped_and_empty_lines_are_left_out(tmp_path):
    hostile = "</script><script>alert(\"1\")</script> & <b onclick='x'>"
    (tmp_path / "in").write_text(f"{hostile}\n\n  \nOpen the file.\nClose it.\n", encoding="utf-8")
    (tmp_path / "reference").write_text(f"{hostile}\n\n\nR2\nR3\n", encoding="utf-8")
    files = ["--input", str(tmp_path / "in"), "--reference", str(tmp_path / "reference")]
    page = shown(tmp_path, *files, "--models", "levenshtein-en-de", "--sentences", "2")
    assert page.count("<script>") == page.count("</script>") == 1 and "<b onclick" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;") >= 2
    assert page.count('<section class="example">') == 2 and "R2" in page and "R3" not in page


def test_a_masked_language_model_shows_prompt_masks_and_commits(tmp_path):
    _, vocabulary = load_model("cmlm-en-de")
    torch.manual_seed(0)
    shape = dict(width=16, feed_forward=32, encoder_layers=1, heads=2, block_length=4)
    save_model(tmp_path / "lm", MaskedLM(MaskedLMConfig(vocab_size=len(vocabulary), **shape)), vocabulary)
    (tmp_path / "in").write_text("open the file\n", encoding="utf-8")
    page = shown(
        tmp_path, "--models", str(tmp_path / "lm"), "--input", str(tmp_path / "in"),
        "--strategies", "block_diffusion:policy=quota,steps=2,max_length=8", "block_diffusion:max_length=4",
    )  # fmt: skip
    assert re.findall(r"<h3>(\w+) ", page) == ["block_diffusion"] * 2
    assert "lm · policy=quota, steps=2, max_length=8" in page
    body = page[page.index("<main>") :]
    assert "token given" in body and 'class="token mask"' in body and re.search(r'class="token p\d committed"', body)
    assert re.search(r"commits \d", body)


def test_strategies_go_to_the_models_they_suit():
    kinds = {"a/one": "cmlm", "two": "levenshtein"}
    plan = planned(Show(strategies=("insert", "mask_predict:iterations=3", "refine")), kinds)
    assert plan == [
        ("a/one", "one · iterations=3", "mask_predict", {"iterations": 3}),
        ("a/one", "one", "refine", {}),
        ("two", "two", "insert", {}),
    ]
    assert parse("block_diffusion:policy=entropy,threshold=0.5,prefix_cache=False") == (
        "block_diffusion", {"policy": "entropy", "threshold": 0.5, "prefix_cache": False}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models"], "models must name at least one; got none"),
        (["--strategies", "beam"], "strategies: beam must be one of mask_predict, refine, which the models given can"),
        (["--strategies", "refine:5"], "must have options of the form name=value; got '5'"),
        (["--strategies", "refine:rounds=5"], "rounds is not an option of strategy 'refine'"),
        (["--strategies", "refine:window=1"], "window must be >= 2; got 1"),
        (["--strategies", "refine:trace=True"], "must not set trace"),
        (["--sentences", "0"], "sentences must be >= 1; got 0"),
        (["--reference", "x"], "reference must come with input"),
        (["--input", "/dev/null"], "must have a line that is not empty"),
        (["--output", "/nowhere/page.html"], "the folder of /nowhere/page.html does not exist"),
        (["--models", "nothing"], "model must be a model folder or one of"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, capsys):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "page.html")]
    models = [] if "--models" in arguments else ["--models", "cmlm-en-de"]
    assert main(["show", *output, *models, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
