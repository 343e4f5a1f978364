"""Sequence-level knowledge distillation (Kim and Rush 2016): a teacher translates the training source.

  condgen-fast distill --model runs/teacher --source train.en --output distilled.de            # beam 5
  condgen-fast distill … --strategy greedy
  condgen-fast distill … --strategy sample --top-k 10 --seed 1
  torchrun --nproc-per-node 2 -m condgen_fast.cli distill …                                     # sharded by rank

What is done is kept in OUTPUT.parts: a run that was stopped goes on where it was. A student is then trained on
(train.en, distilled.de).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from condgen_fast.data.distilled import DistilledCorpus
from condgen_fast.data.text import read_lines
from condgen_fast.models.checkpoint import fingerprint, load_model
from condgen_fast.recipes.evaluation import DecodingOptions, batches_by_length, translate_batch
from condgen_fast.recipes.training import choose_device, start_process_group


@dataclass(kw_only=True)
class Distill(DecodingOptions):
    """Translate a training source with a teacher."""

    model: str
    """teacher: a model folder or a shipped model's name"""
    source: Path
    """training source, one sentence a line"""
    output: Path
    """where the teacher's translations go, line-aligned with the source"""
    max_tokens: int = 4096
    """padded source tokens decoded at a time, per process"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


def main(options: Distill) -> None:
    rank, world_size = start_process_group(timedelta(days=7))  # shards end at different times
    device = choose_device(options.device)
    model, vocabulary = load_model(options.model, device=device)
    strategy, choices = options.strategy_for(model)
    sources = read_lines(options.source)
    description = {"teacher": fingerprint(model), "strategy": strategy} | choices
    parts = options.output.with_name(options.output.name + ".parts")
    corpus = DistilledCorpus.open(parts, sources=sources, description=description, rank=rank, world_size=world_size)

    missing = corpus.missing()
    encoded = vocabulary.encode([sources[i] for i in missing])
    longest = model.max_positions - 1
    kept = [k for k, ids in enumerate(encoded) if 0 < len(ids) <= longest]
    # Lines the teacher cannot read stay empty, and training leaves them out; the output keeps its line numbers.
    if len(kept) < len(missing):
        print(
            f"{len(missing) - len(kept)} lines are empty or have more than {longest} tokens; their translation is empty"
        )
    corpus.append(sorted(set(missing) - {missing[k] for k in kept}), [""] * (len(missing) - len(kept)))
    with tqdm(total=len(missing), initial=len(missing) - len(kept), unit="sentence", disable=rank != 0) as bar:
        for batch in batches_by_length([len(encoded[k]) for k in kept], options.max_tokens):
            rows = [kept[i] for i in batch]
            tokens, _ = translate_batch(model, [encoded[k] for k in rows], strategy, **choices)
            corpus.append([missing[k] for k in rows], vocabulary.decode(tokens))
            bar.update(len(rows))
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        corpus.finish(options.output)
