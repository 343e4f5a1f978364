"""One self-contained HTML page that shows, sentence by sentence and strategy beside strategy, what decoding did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

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
}


@dataclass(frozen=True)
class Run:
    """What one strategy did to one sentence."""

    name: str
    trace: Trace
    # The piece of text a token id stands for; a leading "▁" (SentencePiece) begins a word.
    token_text: Callable[[int], str]
    # The finished text, shown below the steps.
    output: str = ""


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
            '<span class="token p3 written">written now</span>',
            '<span class="token p1 masked">masked again</span>',
            '<span class="token p1 deleted">deleted</span>',
            '<span class="token mask"></span> mask',
            '<span class="token mask inserted"></span> mask inserted',
            '<span class="token given">given</span>',
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
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
<label><input type="checkbox" id="numbers"> show probabilities</label></p>
</header>
<main>
{"".join(_example(number, example) for number, example in enumerate(examples, start=1))}
</main>
<script>{_SCRIPT}</script>
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
<label><span>round <output>1</output> of {last}</span><input type="range" min="{first}" max="{last}"
value="1"></label></div>
<div class="runs">{"".join(_run(run) for run in example.runs)}</div>
</section>
"""


def _run(run: Run) -> str:
    rounds = []
    post_edited = any(step.operation == "start" for step in run.trace.steps)
    for iteration, steps in itertools.groupby(run.trace.steps, key=lambda step: step.iteration):
        lines = "".join(_step(step, run, post_edited) for step in steps)
        heading = f"Round {iteration}" if iteration else "Start"
        rounds.append(f'<li class="round" data-round="{iteration}"><h4>{heading}</h4>{lines}</li>\n')
    count = run.trace.iterations
    output = f'<p class="output">{escape(run.output)}</p>' if run.output else ""
    return f"""<article class="run">
<h3>{escape(run.name)} <small>{count} round{"" if count == 1 else "s"}</small></h3>
<ol>{"".join(rounds) or "<li>nothing was written</li>"}</ol>
{output}</article>
"""


def _step(step: Step, run: Run, post_edited: bool) -> str:
    verb, mark = OPERATIONS.get(step.operation, (step.operation, "written"))
    touched = sum(step.touched)
    count = f" {touched}" if step.operation in ("mask", "delete", "insert", "fill") else ""
    tokens = []
    for token, log_prob, flag in zip(step.tokens, step.log_probs, step.touched, strict=True):
        classes = ["token"]
        probability = math.exp(log_prob)
        if token in (run.trace.bos_id, run.trace.eos_id):
            # bos and eos have no probability of their own, except where a strategy writes eos.
            tokens.append(f' <span class="edge{" " + mark if flag else ""}"></span>')
            continue
        title = f"p = {probability:.3f}"
        if token == run.trace.mask_id:
            classes.append("mask")
            text, title, gap = "", "mask", " "
        else:
            text = run.token_text(token)
            gap = " " if text.startswith("▁") else ""
            text = text.removeprefix("▁") or "␣"
            if post_edited and log_prob == 0.0:
                classes.append("given")
                title = "given"
            else:
                classes.append(f"p{sum(probability > bound for bound in LEVELS[:-1])}")
        if flag and mark:
            classes.append(mark)
        number = f"<sub>{probability:.2f}</sub>" if title.startswith("p") else ""
        tokens.append(f'{gap}<span class="{" ".join(classes)}" title="{title}">{escape(text)}{number}</span>')
    return f'<div class="step"><span class="what">{escape(verb)}{count}</span><p>{"".join(tokens)}</p></div>'


_STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #1d1f21; --soft: #62676d; --line: #dcd9d2;
  --p0: #f0935b; --p1: #f8c59b; --p2: #f3ead2; --p3: #b9dcec; --p4: #85c2e2; --gone: #b3261e; --now: #1d1f21; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --card: #1f2224; --ink: #eceae5; --soft: #a2a7ac;
  --line: #3a3e42; --p0: #a34f1a; --p1: #7b5230; --p2: #4b483c; --p3: #2c576d; --p4: #1b6c98; --gone: #ff8a80;
  --now: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 4rem; max-width: 96rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
header p { max-width: 46rem; margin: .5rem 0; }
.legend { margin: 1rem 0 .5rem; display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.legend div { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; }
.legend dt { color: var(--soft); font-size: .85rem; }
.legend dd { margin: 0; display: flex; flex-wrap: wrap; gap: .3rem .5rem; align-items: baseline; }
.legend dd, .legend .token { font-size: .8rem; }
.switches { color: var(--soft); font-size: .9rem; }
.switches label { margin-right: 1.25rem; white-space: nowrap; }
.example { margin-top: 2.25rem; padding-top: 1rem; border-top: 2px solid var(--line); }
.example h2 { font-size: 1.15rem; line-height: 1.35; margin: 0 0 .25rem; overflow-wrap: anywhere; }
.example h2 span { color: var(--soft); font-weight: 400; margin-right: .25rem; }
.example > p { margin: 0 0 .5rem; color: var(--soft); overflow-wrap: anywhere; }
.example > p b { font-weight: 600; font-size: .8rem; margin-right: .35rem; }
.control { display: none; position: sticky; top: 0; z-index: 1; gap: .75rem; align-items: center; padding: .5rem 0;
  background: var(--page); }
.js .control { display: flex; }
.js .every .control { display: none; }
.control label { display: flex; flex: 1; flex-wrap: wrap; align-items: center; gap: .1rem .75rem; color: var(--soft);
  font-size: .9rem; font-variant-numeric: tabular-nums; }
.control output { color: var(--ink); font-weight: 600; }
.control input { flex: 1 1 9rem; max-width: 34rem; margin: 0; accent-color: #2f80b4; }
.control button { width: 2.25rem; height: 2.25rem; border: 1px solid var(--line); border-radius: 50%; padding: 0;
  background: var(--card); color: var(--ink); font-size: .8rem; cursor: pointer; }
.runs { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
.run { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem;
  min-width: 0; }
.run h3 { font-size: 1rem; margin: 0 0 .25rem; display: flex; justify-content: space-between; gap: 1rem;
  align-items: baseline; }
.run h3 small { color: var(--soft); font-weight: 400; white-space: nowrap; }
.run ol { list-style: none; margin: 0; padding: 0; }
.round h4 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: .7rem 0 0; }
.js .example:not(.every) .round:not(.now) { display: none; }
.step { margin: .3rem 0 .55rem; }
.what { display: block; color: var(--soft); font-size: .75rem; }
.step p { margin: .1rem 0 0; line-height: 2.05; word-spacing: .06em; }
.token { display: inline-block; min-width: 1rem; padding: 0 .25rem; margin-right: 1px; border: 2px solid transparent;
  border-radius: .3rem; line-height: 1.4; font-size: .92rem; text-align: center; white-space: pre; color: var(--ink); }
.token sub { display: none; font-size: .62rem; line-height: 1; opacity: .8; }
.numbers .token sub { display: block; padding-bottom: .1rem; }
.edge { display: inline-block; width: 3px; height: 1.3rem; border-radius: 2px; background: var(--line);
  vertical-align: -.25rem; }
.edge.written { background: var(--now); }
.p0 { background: var(--p0); } .p1 { background: var(--p1); } .p2 { background: var(--p2); }
.p3 { background: var(--p3); } .p4 { background: var(--p4); }
.token.mask { min-width: 1.9rem; border: 2px dotted var(--soft); color: var(--soft);
  background: repeating-linear-gradient(-45deg, transparent 0 4px, var(--line) 4px 6px); }
.token.given { border: 2px solid var(--line); background: none; }
.token.mask:empty::after { content: "\\a0"; }
.token.mask.inserted { border: 2px solid var(--now); color: var(--ink); }
.token.mask.inserted:empty::after { content: "+"; font-weight: 700; }
.token.written { box-shadow: inset 0 -3px var(--now); }
.token.masked { border: 2px dashed var(--now); }
.token.deleted { border-color: var(--gone); text-decoration: line-through 2px var(--gone); }
.output { margin: .6rem 0 0; padding-top: .5rem; border-top: 1px solid var(--line); overflow-wrap: anywhere;
  color: var(--soft); }
.done .output { color: var(--ink); }
.js .example:not(.every) .run.done h3 small::before { content: "✓ "; }
@media (max-width: 30rem) { .run { padding: .6rem .65rem; } h1 { font-size: 1.3rem; } }
"""

_SCRIPT = """
document.documentElement.classList.add("js");
const examples = [...document.querySelectorAll(".example")].map(example => {
  const slider = example.querySelector("input"), output = example.querySelector("output");
  const button = example.querySelector("button");
  const runs = [...example.querySelectorAll(".run")].map(run => ({run, rounds: [...run.querySelectorAll(".round")]}));
  let timer = null;
  const show = () => {
    output.textContent = slider.value;
    for (const {run, rounds} of runs) {
      const reached = rounds.filter(round => +round.dataset.round <= +slider.value);
      for (const round of rounds) round.classList.toggle("now", round === reached.at(-1));
      run.classList.toggle("done", reached.length === rounds.length);
    }
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "▶"; button.ariaLabel = "play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = slider.min;
    show();
    button.textContent = "❚❚"; button.ariaLabel = "pause";
    timer = setInterval(() => { slider.stepUp(); show(); if (slider.value === slider.max) stop(); }, 900);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  show();
  return example;
});
const all = document.getElementById("all"), numbers = document.getElementById("numbers");
const switches = () => {
  for (const example of examples) example.classList.toggle("every", all.checked);
  document.body.classList.toggle("numbers", numbers.checked);
};
all.addEventListener("change", switches);
numbers.addEventListener("change", switches);
switches();
"""
