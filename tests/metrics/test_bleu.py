"""Corpus scores against sacrebleu's own functions and values known by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen_fast.metrics import bleu, chrf, ter

LINES = st.lists(
    st.tuples(*[st.lists(st.sampled_from("the cat sat on a mat .".split()), max_size=8).map(" ".join)] * 2), min_size=1
)


@settings(max_examples=30, deadline=None)
@given(LINES)
def test_equal_to_sacrebleu(pairs):
    hypotheses, references = [list(side) for side in zip(*pairs, strict=True)]
    assert bleu(hypotheses, references).score == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert chrf(hypotheses, references).score == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert ter(hypotheses, references).score == sacrebleu.corpus_ter(hypotheses, [references]).score


def test_known_values():
    reference = ["a b c d e f g h"]
    assert bleu(reference, reference).score == pytest.approx(100)
    assert bleu(["a b c d"], reference).score == pytest.approx(100 * math.exp(-1))
    assert bleu([""], reference).score == 0
    assert ter(["a b c x"], ["a b c d"]).score == pytest.approx(25)
    assert ter(["c d a b"], ["a b c d"]).score == pytest.approx(25)  # one block moved
    assert chrf(reference, reference).score == pytest.approx(100)


def test_signatures_say_how():
    lines = ["一二三 四"]
    assert "tok:13a" in bleu(lines, lines).signature and "version:" in bleu(lines, lines).signature
    assert "tok:zh" in bleu(lines, lines, tokenize="zh").signature
    assert "nw:2" in chrf(lines, lines, word_order=2).signature and chrf(lines, lines, word_order=2).name == "chrF++"
    assert str(ter(lines, lines)).startswith("TER 0.00 (nrefs:1|case:lc")


@pytest.mark.parametrize("score", [bleu, chrf, ter])
def test_bad_input(score):
    with pytest.raises(ValueError, match="hypotheses and references must have the same length; got 2 and 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="references must be a list of str"):
        score(["a"], "a")
    assert score([], []).score == 0


def test_bad_options():
    with pytest.raises(ValueError, match="tokenize must be one of .*; got 'moses'"):
        bleu(["a"], ["a"], tokenize="moses")
    with pytest.raises(ValueError, match="word_order must be at least 0; got -1"):
        chrf(["a"], ["a"], word_order=-1)
