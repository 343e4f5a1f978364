"""One self-contained HTML page that shows, sentence by sentence and strategy beside strategy, what decoding did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from condgen_fast.decode.page_assets import SCRIPT, STYLE
from condgen_fast.decode.trace import Step, Trace

# Upper bounds of the probability levels that have a colour each.
LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
# operation → (what the step's line says, how the touched tokens are marked)
OPERATIONS = {
    "start": ("given", ""),
    "predict": ("predicts all", "written"),
    "mask": ("masks again", "masked"),
    "delete": ("deletes", "deleted"),
    "insert": ("inserts", "inserted"),
    "fill": ("fills", "written"),
    "restore": ("returns the better of two alternating canvases", "written"),
    "result": ("ends with", "written"),
    "write": ("writes", "written"),
    "rewrite": ("predicts all anew, changes", "written"),
    "put": ("inserts", "inserted"),
    "commit": ("commits", "committed"),
}
COUNTED = ("mask", "delete", "insert", "fill", "rewrite", "put", "commit")


@dataclass(frozen=True)
class Run:
    """What one strategy did to one sentence."""

    name: str
    trace: Trace
    # The piece of text a token id stands for; a leading "▁" (SentencePiece) begins a word.
    token_text: Callable[[int], str]
    # The finished text, shown below the steps.
    output: str = ""
    # Said in small letters below the name: options, the model.
    detail: str = ""


@dataclass(frozen=True)
class Example:
    """One sentence and the strategies to compare on it."""

    source: str
    runs: Sequence[Run]
    reference: str = ""


def page(examples: Sequence[Example], *, title: str = "Decoding, step by step", introduction: str = "") -> str:
    """The page as text: no external resources, light and dark, narrow and wide; without scripts it shows every round.

    A slider per example moves all its strategies through their rounds together. `introduction` is plain text.
    """
    legend = "".join(
        f'<span class="token p{level}">{low:.0%}–{high:.0%}</span>'.replace("%–", "–")
        for level, (low, high) in enumerate(itertools.pairwise((0.0, *LEVELS)))
    )
    marks = "".join(
        f"<span>{mark}</span>"
        for mark in (
            '<span class="token p3 written">written</span>',
            '<span class="token p3 committed">committed</span>',
            '<span class="token p3 inserted">inserted</span>',
            '<span class="token p1 masked">masked again</span>',
            '<span class="token p1 deleted">deleted</span>',
            '<span class="token mask"></span> mask',
            '<span class="token mask inserted"></span> mask inserted',
            '<span class="token given">given</span>',
            '<span class="edge"></span> begin, end',
            '<span class="edge written"></span> end written or committed',
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{f"<p>{escape(introduction)}</p>" if introduction else ""}
<dl class="legend">
<div><dt>Probability</dt><dd>{legend}</dd></div>
<div><dt>Marks</dt><dd>{marks}</dd></div>
</dl>
<p class="switches"><label><input type="checkbox" id="all"> show every round</label>
<label><input type="checkbox" id="numbers"> show probabilities</label>
<span class="keys"><kbd>←</kbd> <kbd>→</kbd> round by round, <kbd>space</kbd> plays</span></p>
</header>
<main>
{"".join(_example(number, example) for number, example in enumerate(examples, start=1))}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _example(number: int, example: Example) -> str:
    first = min((step.iteration for run in example.runs for step in run.trace.steps), default=1)
    last = max((run.trace.iterations for run in example.runs), default=1)
    reference = f"<p><b>Reference</b> {escape(example.reference)}</p>" if example.reference else ""
    return f"""<section class="example">
<h2><span>{number}</span> {escape(example.source)}</h2>
{reference}
<div class="control"><button type="button" aria-label="play">▶</button>
<label><span>round <output>{first}</output> of {last}</span><input type="range" min="{first}" max="{last}"
value="{first}"></label></div>
<div class="runs">{"".join(_run(run) for run in example.runs)}</div>
</section>
"""


def _run(run: Run) -> str:
    rounds = []
    shown = zip(run.trace.steps, _given(run.trace.steps), strict=True)
    for iteration, steps in itertools.groupby(shown, key=lambda pair: pair[0].iteration):
        lines = "".join(_step(step, run, flags) for step, flags in steps)
        heading = f"Round {iteration}" if iteration else "Start"
        rounds.append(f'<li class="round" data-round="{iteration}"><h4>{heading}</h4>{lines}</li>\n')
    count = run.trace.iterations
    detail = f'<p class="detail">{escape(run.detail)}</p>' if run.detail else ""
    output = f'<p class="output">{escape(run.output)}</p>' if run.output else ""
    return f"""<article class="run">
<h3>{escape(run.name)} <small>{count} round{"" if count == 1 else "s"}</small></h3>
{detail}
<ol>{"".join(rounds) or "<li>nothing was written</li>"}</ol>
{output}</article>
"""


def _given(steps: Sequence[Step]) -> list[list[bool]]:
    """Of each step, which of the tokens that it shows stand there since "start": no model has written them."""
    shown, canvases = [], {}
    now: list[bool] = []  # of the canvas that the next step finds
    for step in steps:
        tokens, touched = step.tokens, step.touched
        before = iter(now)
        if step.operation == "start":
            now = touched
        elif step.operation in ("predict", "rewrite"):  # also what they leave as it is
            now = [False] * len(tokens)
        elif step.operation == "restore":
            now = canvases.get(tuple(tokens), [False] * len(tokens))
        elif step.operation in ("insert", "put"):
            now = [not new and next(before, False) for new in touched]
        elif step.operation in ("mask", "delete"):  # these show the canvas as they find it
            now = [next(before, False) for _ in tokens]
        else:
            now = [next(before, False) and not new for new in touched]
        shown.append(now)
        if step.operation == "delete":
            now, tokens = ([x for x, gone in zip(row, touched, strict=True) if not gone] for row in (now, tokens))
        canvases[tuple(tokens)] = now
    return shown


def _step(step: Step, run: Run, given: list[bool]) -> str:
    verb, mark = OPERATIONS.get(step.operation, (step.operation, "written"))
    touched = sum(step.touched)
    count = f" {touched}" if step.operation in COUNTED else ""
    tokens = []
    for token, log_prob, flag, unwritten in zip(step.tokens, step.log_probs, step.touched, given, strict=True):
        classes = ["token"]
        probability = math.exp(log_prob)
        if token in (run.trace.bos_id, run.trace.eos_id):
            # Nobody predicts bos, nor eos unless a strategy writes it.
            title = "begin" if token == run.trace.bos_id else f"end, p = {probability:.3f}" if flag else "end"
            tokens.append(f'<span class="edge{" " + mark if flag else ""}" title="{title}"></span>')
            continue
        title = f"p = {probability:.3f}"
        if token == run.trace.mask_id:
            classes.append("mask")
            text, title, gap = "", "mask", " "
        else:
            text = run.token_text(token)
            gap = " " if text.startswith("▁") else ""
            text = text.removeprefix("▁") or "␣"
            if unwritten:
                classes.append("given")
                title = "given"
            else:
                classes.append(f"p{sum(probability > bound for bound in LEVELS[:-1])}")
        if flag and mark:
            classes.append(mark)
        number = f"<sub>{probability:.2f}</sub>" if title.startswith("p") else ""
        tokens.append(f'{gap}<span class="{" ".join(classes)}" title="{title}">{escape(text)}{number}</span>')
    return f'<div class="step"><span class="what">{escape(verb)}{count}</span><p>{"".join(tokens)}</p></div>'
