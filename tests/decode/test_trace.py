"""Traces of refinement and of left-to-right decoding, and the page made of them."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from helpers import TableModel, random_table
from masked_models import RandomLM
from refinement_helpers import BOS, EOS, FIRST, MASK, PAD, RandomModel

from condgen_fast.decode import (
    BeamSearch,
    BlockDiffusion,
    Greedy,
    InsertionDecoding,
    IterativeRefinement,
    LevenshteinRefinement,
    MaskPredict,
    Sampling,
    decode,
)
from condgen_fast.decode.html import Example, Run, page
from condgen_fast.decode.trace import Recorder, Step, Trace, left_to_right


def test_no_trace_unless_asked_for():
    for strategy in (MaskPredict(), LevenshteinRefinement()):
        assert decode(RandomModel(), [[5]], strategy).trace is None


@pytest.mark.parametrize("options", [{}, {"initial": [[5, 6], [7, 8, 9]]}, {"eos_penalty": 0.5}])
def test_a_trace_changes_nothing(options):
    plain = decode(RandomModel(), [[5], [6, 7]], "levenshtein", **options)
    traced = decode(RandomModel(), [[5], [6, 7]], "levenshtein", trace=True, **options)
    assert torch.equal(plain.tokens, traced.tokens) and torch.equal(plain.token_log_probs, traced.token_log_probs)
    assert len(traced.trace) == 2


def test_the_trace_of_mask_predict_is_that_of_the_best_candidate():
    for seed in range(8):
        result = decode(RandomModel(seed=seed), [[5], [6, 7]], MaskPredict(iterations=4, n_best=3, trace=True))
        for b, trace in enumerate(result.trace):
            assert trace.steps[-1].tokens[1:-1] == result.to_lists()[b][0]
            assert [step.operation for step in trace.steps] == ["predict", *["mask", "fill"] * (trace.iterations - 1)]


@pytest.mark.parametrize(
    "strategy",
    [
        MaskPredict(iterations=4, n_best=3),
        LevenshteinRefinement(max_iterations=4),
        LevenshteinRefinement(initial=[[5, 6, 7], [8, 9], []]),
        IterativeRefinement(),
        IterativeRefinement(window=3, tolerance=0.5, initial=[[5, 6, 7], [8, 9], []]),
        InsertionDecoding(mode="sequential", max_length=6),
        BlockDiffusion(max_length=5, block_length=3),
    ],
    ids=str,
)
def test_the_last_step_is_what_is_returned(strategy):
    for seed in range(4):
        model = RandomLM(seed=seed) if isinstance(strategy, BlockDiffusion) else RandomModel(seed=seed)
        if isinstance(strategy, IterativeRefinement):
            model._token *= 0.3  # so that it comes to rest, with log-probabilities that still change
        result = decode(model, [[5], [6, 7], [8, 9, 10]], replace(strategy, trace=True))
        for b, trace in enumerate(result.trace):
            last, length = trace.steps[-1], int(result.lengths[b, 0]) + int(result.ended[b, 0])
            tokens = result.to_lists()[b][0] + [EOS] * int(result.ended[b, 0])
            assert last.iteration == trace.iterations
            assert last.tokens[len(last.tokens) - length :] == tokens
            assert last.log_probs[len(last.tokens) - length :] == result.token_log_probs[b, 0, :length].tolist()


@pytest.mark.parametrize("maximum", range(1, 6))
def test_replaying_the_steps_of_levenshtein_gives_its_output(maximum):
    for seed in range(12):
        strategy = LevenshteinRefinement(max_iterations=maximum, initial=[[5, 6], [9] * 5], trace=True)
        result = decode(RandomModel(seed=seed), [[5], [6, 7]], strategy)
        for b, trace in enumerate(result.trace):
            canvas = None
            for step in trace.steps:
                if step.operation == "delete":
                    assert step.tokens == canvas
                    canvas = [token for token, gone in zip(step.tokens, step.touched, strict=True) if not gone]
                    continue
                if step.operation == "insert":
                    assert [t for t, new in zip(step.tokens, step.touched, strict=True) if not new] == canvas
                elif step.operation == "fill":
                    assert [MASK if new else t for t, new in zip(step.tokens, step.touched, strict=True)] == canvas
                elif step.operation == "result":
                    assert step.tokens == canvas
                canvas = step.tokens
            assert canvas[1:-1] == result.to_lists()[b][0]


def test_recorder_skips_what_was_not_touched_and_ends_with_the_result():
    recorder = Recorder(RandomModel(), 3)
    tokens = torch.tensor([[BOS, 7, 8, EOS, PAD], [BOS, 7, EOS, PAD, PAD]])
    log_probs = torch.zeros(2, 5)
    touched = torch.tensor([[False, True, False, False, False], [False] * 5])
    recorder.record(1, "delete", [2, 0], tokens, log_probs, touched)
    final = torch.tensor([[BOS, 8, EOS, PAD], [BOS, EOS, PAD, PAD]])
    log_probs = torch.tensor([[0.0, -2.0, 0.0, 0.0], [0.0] * 4])
    two, zero = recorder.traces(torch.tensor([2, 1]), final, log_probs, torch.tensor([2, 0]))
    assert two.steps == [
        Step(1, "delete", [BOS, 7, 8, EOS], [0.0] * 4, [False, True, False, False]),
        Step(2, "result", [BOS, 8, EOS], [0.0, -2.0, 0.0], [False] * 3),
    ]
    assert zero == Trace([Step(1, "result", [BOS, EOS], [0.0] * 2, [False] * 2)], 1, BOS, EOS, MASK)


def test_left_to_right_writes_a_token_a_step():
    tokens = torch.tensor([[7, 8, 9], [5, PAD, PAD], [PAD, PAD, PAD]])
    log_probs = -torch.arange(12.0).view(3, 4)
    ended = torch.ones(3, dtype=torch.bool)
    traces = left_to_right(tokens, torch.tensor([3, 1, 0]), ended, log_probs, bos_id=BOS, eos_id=EOS)
    assert [trace.iterations for trace in traces] == [4, 2, 1]
    assert traces[1].steps == [
        Step(1, "write", [BOS, 5], [0.0, -4.0], [False, True]),
        Step(2, "write", [BOS, 5, EOS], [0.0, -4.0, -5.0], [False, False, True]),
    ]


@pytest.mark.parametrize("strategy", [Greedy(), BeamSearch(beam_size=3, n_best=2), Sampling(n_samples=2, seed=1)])
def test_left_to_right_strategies_record_their_best_hypothesis(strategy):
    model = TableModel(random_table(3, 40, 9, seed=0), pad_id=0, bos_id=2, eos_id=1)
    source = [[5], [6, 7], [8]]
    plain, traced = decode(model, source, strategy), decode(model, source, replace(strategy, trace=True))
    assert plain.trace is None and torch.equal(plain.tokens, traced.tokens)
    for b, trace in enumerate(traced.trace):
        last = trace.steps[-1]
        assert last.tokens == [2, *traced.to_lists()[b][0], 1] and len(trace.steps) == int(traced.lengths[b, 0]) + 1
        assert last.log_probs[1:] == traced.token_log_probs[b, 0, : len(last.tokens) - 1].tolist()


def test_what_was_cut_has_no_end_and_pad_may_stand_within():
    """As Hugging Face's searches have it."""
    table = random_table(3, 997, 6, seed=1, eos_bias=-9)
    table[..., 0] += 2
    result = decode(TableModel(table), [[0], [1], [2]], BeamSearch(beam_size=2, max_length=4, compat="hf", trace=True))
    assert not result.ended.any() and any(0 in rows[0] for rows in result.to_lists())
    for b, trace in enumerate(result.trace):
        last = trace.steps[-1]
        assert last.tokens == [0, *result.to_lists()[b][0]] and len(trace.steps) == 4
        assert last.log_probs == [0.0, *result.token_log_probs[b, 0, :4].tolist()]


class Outline(HTMLParser):
    """Checks that tags nest, and keeps the classes and the text."""

    VOID = {"meta", "input", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href", "onclick"} & {name for name, _ in attributes}
        self.classes.append(dict(attributes).get("class") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def count(self, *classes: str) -> int:
        return sum(set(classes) <= set(value.split()) for value in self.classes)


def hostile(token: int) -> str:
    return f"▁<b>{token}&\"'"


def test_the_page_shows_every_step_and_marks_what_it_did():
    steps = [
        Step(0, "start", [BOS, 7, 8, EOS], [0.0] * 4, [False, True, True, False]),
        Step(1, "delete", [BOS, 7, 8, EOS], [0.0] * 4, [False, True, False, False]),
        Step(1, "insert", [BOS, MASK, MASK, 8, EOS], [0.0] * 5, [False, True, True, False, False]),
        Step(1, "fill", [BOS, 5, 6, 8, EOS], [0.0, -0.1, -3.0, 0.0, 0.0], [False, True, True, False, False]),
        Step(2, "mask", [BOS, 5, 6, 8, EOS], [0.0, -0.1, -3.0, 0.0, 0.0], [False, False, True, False, False]),
    ]
    runs = [
        Run("a < b", Trace(steps, 2, BOS, EOS, MASK), hostile, output="x < y"),
        Run("none", Trace([], 0, BOS, EOS), str),
    ]
    before = Outline(page([]))
    outline = Outline(page([Example("s < t", runs, reference="r & r")], title="t < u", introduction="i < j"))
    text = " ".join(outline.text)
    for visible in ("a < b", "x < y", "s < t", "r & r", "t < u", "i < j", "<b>5&\"'"):
        assert visible in text

    def added(*classes):
        return outline.count(*classes) - before.count(*classes)

    assert (added("example"), added("run"), added("round"), added("step")) == (1, 2, 3, 5)
    assert (added("token", "deleted"), added("token", "inserted"), added("token", "mask")) == (1, 2, 2)
    assert (added("token", "written"), added("token", "masked"), added("edge")) == (2, 1, 10)
    # p = 0.90 and 0.05; what was given and never written has no colour.
    assert (added("token", "p4"), added("token", "p0"), added("token", "given")) == (2, 2, 2 + 2 + 1 + 1 + 1)


def test_the_page_marks_what_was_committed_put_and_rewritten():
    steps = [
        Step(0, "start", [7, MASK, MASK], [0.0] * 3, [True] * 3),
        Step(1, "commit", [7, 8, MASK], [0.0, -0.1, 0.0], [False, True, False]),
        Step(2, "put", [7, 9, 8], [0.0, -0.1, -0.1], [False, True, False]),
        Step(3, "rewrite", [7, 6, 8], [0.0, -0.1, -0.1], [False, True, False]),
        Step(4, "commit", [7, EOS, EOS], [0.0, 0.0, -0.1], [False, False, True]),
    ]
    text = page([Example("s", [Run("lm", Trace(steps, 3, BOS, EOS, MASK), str, detail="a < b")])])
    body = text[text.index("<main>") : text.index("</main>")]
    for word, mark in (("commits", "committed"), ("inserts", "inserted"), ("predicts all anew, changes", "written")):
        assert f"{word} 1</span>" in body and len(re.findall(rf'class="token p4 {mark}"', body)) == 1
    assert '<span class="edge" title="end">' in body and '<span class="edge committed" title="end, p = 0.905">' in body
    assert "a &lt; b" in body and body.count("token mask") == 2 + 1
    assert 'min="0" max="3"\nvalue="0"' in body


def test_given_is_what_no_model_wrote_however_certain_it_was():
    start = Step(0, "start", [BOS, 7, 8, 9, EOS], [0.0] * 5, [False, True, True, True, False])
    certain = [0.0] * 5
    steps = [
        start,
        Step(1, "delete", [BOS, 7, 8, 9, EOS], certain, [False, False, True, False, False]),
        Step(1, "insert", [BOS, MASK, 7, 9, EOS], certain, [False, True, False, False, False]),
        Step(1, "fill", [BOS, 6, 7, 9, EOS], certain, [False, True, False, False, False]),
        Step(2, "put", [BOS, 6, 7, 5, 9, EOS], [0.0] * 6, [False] * 3 + [True] + [False] * 2),
        Step(3, "restore", [BOS, 6, 7, 9, EOS], certain, [True] * 5),
        Step(3, "result", [BOS, 6, 7, 9, EOS], certain, [False] * 5),
    ]

    def drawn(steps):
        lines = page([Example("s", [Run("r", Trace(steps, 3, BOS, EOS, MASK), str)])]).split('<div class="step">')[1:]
        return [re.findall(r'title="(given|p = 1.000)"[^>]*>(\d)', line) for line in lines]

    given, sure = "given", "p = 1.000"
    edited = [(sure, "6"), (given, "7"), (given, "9")]
    assert drawn(steps) == [
        [(given, "7"), (given, "8"), (given, "9")],
        [(given, "7"), (given, "8"), (given, "9")],
        [(given, "7"), (given, "9")],
        edited,
        [(sure, "6"), (given, "7"), (sure, "5"), (given, "9")],
        edited,
        edited,
    ]
    # a model that predicts all anew has written also what it did not change
    rewritten = Step(1, "rewrite", [BOS, 7, 6, 9, EOS], certain, [False, False, True, False, False])
    assert drawn([start, rewritten])[1] == [(sure, "7"), (sure, "6"), (sure, "9")]
    masked = Step(1, "mask", [BOS, 7, 8, 9, EOS], certain, [False, False, True, False, False])
    filled = Step(1, "fill", [BOS, 7, 8, 9, EOS], certain, [False, False, True, False, False])
    assert drawn([start, masked, filled])[1:] == [
        [(given, "7"), (given, "8"), (given, "9")],
        [(given, "7"), (sure, "8"), (given, "9")],
    ]


def test_the_page_is_self_contained():
    run = Run("random", decode(RandomModel(), [[5]], MaskPredict(trace=True)).trace[0], hostile)
    text = page([Example("source", [run]), Example("again", [run])])
    assert not re.search(r"https?:|@import|url\(|<link", text)
    assert text.count("</section>") == 2 and f'max="{run.trace.iterations}"' in text


def test_probabilities_fall_into_their_level():
    log_probs = torch.tensor([0.0, 0.19, 0.21, 0.59, 0.61, 0.79, 0.81, 1.0]).clamp(min=1e-30).log().tolist()
    step = Step(1, "write", [FIRST] * 8, log_probs, [False] * 8)
    text = page([Example("s", [Run("r", Trace([step], 1, BOS, EOS), str)])])
    body = text[text.index('class="step"') :]
    assert re.findall(r"token p(\d)", body) == list("00123344")
