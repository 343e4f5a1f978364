"""The package in two minutes: five ways to translate the embedded test set, measured, pictured and shown step by step.

  condgen-fast demo                     # writes demo-output/{results.csv, quality-latency.png, refinement.html}

Three shipped models, English to German, trained on LibreOffice's help alone: an autoregressive Transformer, and a CMLM
and a Levenshtein Transformer trained on that Transformer's translations.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from condgen_fast.data import embedded
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.decode import BeamSearch, Greedy, LevenshteinRefinement, MaskPredict
from condgen_fast.decode.html import Example, Run, page
from condgen_fast.metrics.bleu import bleu
from condgen_fast.models.checkpoint import load_model
from condgen_fast.models.layers import EncoderDecoder
from condgen_fast.recipes.evaluation import batches_by_length, translate_batch
from condgen_fast.recipes.training import choose_device

SYSTEMS = (
    ("greedy", "transformer-en-de", Greedy()),
    ("beam 5", "transformer-en-de", BeamSearch(beam_size=5)),
    ("Mask-Predict T=1", "cmlm-en-de", MaskPredict(iterations=1)),
    ("Mask-Predict T=4", "cmlm-en-de", MaskPredict(iterations=4)),
    ("Mask-Predict T=10", "cmlm-en-de", MaskPredict(iterations=10)),
    ("LevT", "levenshtein-en-de", LevenshteinRefinement(eos_penalty=1.5)),  # the penalty is best on the valid set
)
BASELINE = "beam 5"


@dataclass(kw_only=True)
class Demo:
    """Compare the decoding strategies on the shipped models and the embedded test set."""

    output: Path = Path("demo-output")
    """folder for the table, the picture and the page"""
    sentences: int | None = None
    """test sentences translated, from the first; all by default"""
    latency_sentences: int = 40
    """test sentences translated one at a time to measure latency"""
    page_sentences: int = 6
    """test sentences whose refinement the page shows"""
    max_tokens: int = 2048
    """padded source tokens of a batch in the throughput measurement"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


@dataclass(frozen=True)
class Row:
    """What was measured of one system."""

    system: str
    bleu: float
    latency: float  # milliseconds a sentence at batch 1, median over sentences
    throughput: float  # sentences a second, batched
    iterations: float  # mean rounds a sentence; steps for left-to-right decoding
    speedup: float  # of the latency over the baseline


def main(options: Demo) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    device = choose_device(options.device)
    sources, references = (lines[: options.sentences] for lines in embedded.load("test"))
    models = {name: load_model(name, device=device) for name in dict.fromkeys(name for _, name, _ in SYSTEMS)}

    measured, signature = [], ""
    for system, name, strategy in tqdm(SYSTEMS, desc="measuring", unit="system"):
        model, vocabulary = models[name]
        encoded = vocabulary.encode(sources)
        latency = latency_of(model, encoded[: options.latency_sentences], strategy)
        outputs, iterations, seconds = translate_all(model, vocabulary, encoded, strategy, options.max_tokens)
        score = bleu(outputs, references)
        signature = score.signature
        measured.append((system, score.score, latency, len(sources) / seconds, iterations))
    baseline = next(latency for system, _, latency, _, _ in measured if system == BASELINE)
    rows = [Row(*values, speedup=baseline / values[2]) for values in measured]

    print(f"\n{table(rows)}\n\nBLEU: {signature}")
    print(f"{len(sources)} sentences of LibreOffice help, English to German; {machine(device)}")
    write_csv(rows, options.output / "results.csv")
    draw(rows, options.output / "quality-latency.png")
    write_page(models, sources, references, options)
    print(f"picture {options.output / 'quality-latency.png'}\npage    {options.output / 'refinement.html'}")


def latency_of(model: EncoderDecoder, encoded: list[list[int]], strategy: object) -> float:
    """Median milliseconds to translate one sentence alone, after three sentences of warm-up."""
    for ids in encoded[:3]:
        translate_batch(model, [ids], strategy)
    times = []
    for ids in encoded:
        start = time.perf_counter()
        translate_batch(model, [ids], strategy)  # ends with ids on the host, so a GPU has finished
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def translate_all(
    model: EncoderDecoder, vocabulary: Vocabulary, encoded: list[list[int]], strategy: object, max_tokens: int
) -> tuple[list[str], float, float]:
    """Translations, mean iterations a sentence, and the seconds it took, in batches of similar length."""
    outputs, iterations = [""] * len(encoded), 0
    start = time.perf_counter()
    for batch in batches_by_length([len(ids) for ids in encoded], max_tokens):
        tokens, hypotheses = translate_batch(model, [encoded[i] for i in batch], strategy)
        iterations += int(hypotheses.iterations.sum())
        for i, text in zip(batch, vocabulary.decode(tokens), strict=True):
            outputs[i] = text
    return outputs, iterations / len(encoded), time.perf_counter() - start


def table(rows: list[Row]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        f"| {'system':<17} | {'BLEU':>5} | ms/sentence, batch 1 | speed-up | sentences/s, batched | iterations |",
        f"|{'-' * 19}|{'-' * 6}:|{'-' * 21}:|{'-' * 9}:|{'-' * 21}:|{'-' * 11}:|",
    ]
    lines += [
        f"| {row.system:<17} | {row.bleu:5.1f} | {row.latency:20.1f} | {row.speedup:7.2f}× | {row.throughput:20.1f} "
        f"| {row.iterations:10.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def machine(device: str) -> str:
    """Where the numbers were taken."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_csv(rows: list[Row], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)


def draw(rows: list[Row], path: Path) -> None:
    """Quality against latency: up and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    families = {"greedy": "o", "beam": "o", "Mask-Predict": "s", "LevT": "D"}
    for row in rows:
        color, marker = next(
            (f"C{i}", m) for i, (name, m) in enumerate(families.items()) if row.system.startswith(name)
        )
        axis.plot(row.latency, row.bleu, marker, color=color, markersize=9)
        axis.annotate(row.system, (row.latency, row.bleu), xytext=(0, 9), textcoords="offset points", ha="center")
    predicted = [row for row in rows if row.system.startswith("Mask-Predict")]
    axis.plot([row.latency for row in predicted], [row.bleu for row in predicted], "C2-", alpha=0.4, zorder=0)
    axis.set(xlabel="milliseconds a sentence, batch 1 (log scale)", ylabel="BLEU", xscale="log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(x=0.15, y=0.15)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_page(
    models: dict[str, tuple[EncoderDecoder, Vocabulary]], sources: list[str], references: list[str], options: Demo
) -> None:
    """How each kind of model arrived at its translation of a few sentences of middling length, as an HTML page."""
    middling = [i for i, line in enumerate(sources) if 8 <= len(line.split()) <= 18]
    chosen = middling[:: max(1, len(middling) // max(options.page_sentences, 1))][: options.page_sentences]
    examples = []
    for i in chosen:
        runs = []
        for system, name, strategy in SYSTEMS:
            if system not in ("beam 5", "Mask-Predict T=10", "LevT"):
                continue
            model, vocabulary = models[name]
            strategy = replace(strategy, trace=True)
            tokens, hypotheses = translate_batch(model, vocabulary.encode([sources[i]]), strategy)
            runs.append(
                Run(system, hypotheses.trace[0], lambda t, v=vocabulary: v.pieces([t])[0], vocabulary.decode(tokens)[0])
            )
        examples.append(Example(sources[i], runs, references[i]))
    text = page(
        examples,
        title="Three ways to a translation",
        introduction="English to German, LibreOffice help: from left to right, by re-predicting what is unsure"
        " (Mask-Predict), and by deleting and inserting (Levenshtein Transformer).",
    )
    (options.output / "refinement.html").write_text(text, encoding="utf-8")
