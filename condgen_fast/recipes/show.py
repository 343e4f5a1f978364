"""Show how strategies arrive at their output, step by step and side by side, as one self-contained HTML page.

condgen-fast show                                             # the shipped models on three test sentences
echo "Open the file." | condgen-fast show --input - --output page.html
condgen-fast show --models cmlm-en-de --strategies mask_predict:iterations=4 mask_predict:iterations=10 refine
condgen-fast show --models runs/masked-lm --strategies block_diffusion:policy=entropy,threshold=0.2
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from condgen_fast._check import check_number
from condgen_fast.data import embedded
from condgen_fast.data.files import check_writable, write_atomically
from condgen_fast.data.text import read_lines
from condgen_fast.decode.html import Example, Run, page
from condgen_fast.models.checkpoint import kind, load_model
from condgen_fast.recipes.evaluation import OWN_STRATEGY, translate_batch
from condgen_fast.recipes.training import choose_device

SHOWN_BY_DEFAULT = (12, 83, 265)  # test sentences of middling length

STRATEGIES = {
    "transformer": ("greedy", "beam", "sample"),
    "cmlm": ("mask_predict", "refine"),
    "levenshtein": ("levenshtein", "insert"),
    "masked_lm": ("block_diffusion",),
}
"""What each kind of model can be decoded by."""


@dataclass(kw_only=True)
class Show:
    """Write a page that shows decoding step by step."""

    models: tuple[str, ...] = ("transformer-en-de", "cmlm-en-de", "levenshtein-en-de")
    """shipped models' names or model folders"""
    strategies: tuple[str, ...] = ()
    """names, with options as in mask_predict:iterations=4,length_beam=3; each is shown for every model that it can
    decode; by default each model's own"""
    input: str | None = None
    """text file, one sentence a line; - is standard input; by default a few sentences of the embedded test set"""
    reference: str | None = None
    """text file, line-aligned with the input, shown above what the models wrote"""
    output: Path = Path("decoding.html")
    """the page"""
    sentences: int = 20
    """lines shown at most, from the first; empty ones are left out"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


def main(options: Show) -> None:
    if not options.models:
        raise ValueError("models must name at least one; got none")
    check_number(options.sentences, "sentences", minimum=1, integer=True)
    check_writable(options.output)
    device = choose_device(options.device)
    models = {name: load_model(name, device=device) for name in options.models}
    plan = planned(options, {name: kind(model) for name, (model, _) in models.items()})
    lines, references = text_of(options)
    runs: list[list[Run]] = [[] for _ in lines]
    for name, detail, strategy, choices in plan:
        model, vocabulary = models[name]
        tokens, hypotheses = translate_batch(model, vocabulary.encode(lines), strategy, trace=True, **choices)
        pieces = vocabulary.pieces(range(len(vocabulary)))
        for line, trace, text in zip(runs, hypotheses.trace, vocabulary.decode(tokens), strict=True):
            line.append(Run(strategy, trace, pieces.__getitem__, text, detail))
    examples = [Example(*parts) for parts in zip(lines, runs, references, strict=True)]
    write_atomically(options.output, [page(examples).encode("utf-8")])
    print(f"{len(examples)} sentences, {len(plan)} strategies: {options.output}")


def planned(options: Show, kinds: dict[str, str]) -> list[tuple[str, str, str, dict[str, object]]]:
    """(model's name, what the page says of the run, strategy, its options) of every run, model by model."""
    wanted = [(text, *parse(text)) for text in options.strategies]
    for text, strategy, _ in wanted:
        if not any(strategy in STRATEGIES[k] for k in kinds.values()):
            known = ", ".join(dict.fromkeys(s for k in kinds.values() for s in STRATEGIES[k]))
            raise ValueError(f"strategies: {text} must be one of {known}, which the models given can be decoded by")
    plan = []
    for name, k in kinds.items():
        fitting = [w for w in wanted if w[1] in STRATEGIES[k]] if wanted else [("", OWN_STRATEGY[k], {})]
        for text, strategy, choices in fitting:
            stated = text.partition(":")[2].replace(",", ", ")
            plan.append((name, " · ".join(filter(None, (Path(name).name, stated))), strategy, choices))
    return plan


def parse(text: str) -> tuple[str, dict[str, object]]:
    """ "mask_predict:iterations=4,length_beam=3" -> ("mask_predict", {"iterations": 4, "length_beam": 3})."""
    name, _, rest = text.partition(":")
    choices: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"strategies: {text} must have options of the form name=value; got {part!r}")
        try:
            choices[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            choices[key] = value
    if "trace" in choices:
        raise ValueError(f"strategies: {text} must not set trace, which the page needs")
    return name, choices


def text_of(options: Show) -> tuple[list[str], list[str]]:
    """The lines to show, and a reference for each ("" where there is none)."""
    if options.input is None:
        if options.reference is not None:
            raise ValueError("reference must come with input; the embedded sentences have theirs")
        chosen = [[lines[i] for i in SHOWN_BY_DEFAULT] for lines in embedded.load("test")]
        return chosen[0][: options.sentences], chosen[1][: options.sentences]
    lines = read_lines(options.input)
    references = [""] * len(lines) if options.reference is None else read_lines(options.reference)
    if len(references) != len(lines):
        raise ValueError(f"reference must have as many lines as input, {len(lines)}; got {len(references)}")
    pairs = [pair for pair in zip(lines, references, strict=True) if pair[0].strip()][: options.sentences]
    if not pairs:
        raise ValueError(f"input {options.input} must have a line that is not empty")
    return [a for a, _ in pairs], [b for _, b in pairs]
