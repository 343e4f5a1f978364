"""Sequence-level knowledge distillation (Kim and Rush 2016): a teacher translates the training source. Or, with
--store-top-k, word-level: it writes its most probable tokens at every position of a given target text.

  condgen-fast distill --model runs/teacher --source train.en --output distilled.de            # beam 5
  condgen-fast distill … --strategy greedy
  condgen-fast distill … --strategy sample --top-k 10 --seed 1
  condgen-fast distill --model runs/teacher --source train.en --target train.de --output teacher.store --store-top-k 64
  torchrun --nproc-per-node 2 -m condgen_fast.cli distill …                                     # sharded by rank

What is done is kept in OUTPUT.parts: a run that was stopped goes on where it was. A student is then trained on
(train.en, distilled.de), or on (train.en, train.de) with --teacher-store teacher.store.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from condgen_fast.data.batching import ParallelDataset
from condgen_fast.data.distilled import DistilledCorpus
from condgen_fast.data.teacher_store import TeacherStoreWriter
from condgen_fast.data.text import read_lines, read_parallel
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.models.checkpoint import fingerprint, kind, load_model
from condgen_fast.models.transformer import Transformer
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
    """where the teacher's translations go, line-aligned with the source; or, with --store-top-k, the store"""
    target: Path | None = None
    """with --store-top-k: the text to store distributions for, line-aligned with the source: gold, or translations"""
    store_top_k: int | None = None
    """do not translate: store this many most probable tokens at every position of the target, for
    train transformer --teacher-store"""
    store_temperature: float = 1.0
    """with --store-top-k: the teacher's softmax temperature"""
    max_tokens: int = 4096
    """padded source tokens decoded at a time, per process"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""


def main(options: Distill) -> None:
    rank, world_size = start_process_group(timedelta(days=7))  # shards end at different times
    device = choose_device(options.device)
    model, vocabulary = load_model(options.model, device=device)
    if options.store_top_k is not None:
        return store_top_k(options, model, vocabulary, rank, world_size)
    if options.target is not None:
        raise ValueError("target must be left out without --store-top-k: the teacher translates the source")
    if options.store_temperature != 1.0:
        raise ValueError(f"store_temperature must be left out without --store-top-k; got {options.store_temperature}")
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


@torch.no_grad()
def store_top_k(options: Distill, model: Transformer, vocabulary: Vocabulary, rank: int, world_size: int) -> None:
    """Write the store of the teacher's top-k distributions, teacher-forced on the target."""
    if kind(model) != "transformer":
        raise ValueError(f"model must be an autoregressive transformer to store its top k; got a {kind(model)}")
    if options.target is None:
        raise ValueError("target must be given with --store-top-k; got None")
    for field in fields(DecodingOptions):
        if getattr(options, field.name) != field.default:
            raise ValueError(
                f"{field.name} must be left out with --store-top-k, which decodes nothing;"
                f" got {getattr(options, field.name)}"
            )
    source, target = read_parallel(options.source, options.target)
    data = ParallelDataset.encode(source, target, vocabulary, max_length=model.max_positions - 1)
    lengths = np.zeros(len(target), dtype=np.int64)  # lines that the teacher cannot read keep 0
    lengths[data.lines] = data.target_lengths - 1
    with TeacherStoreWriter.open(
        options.output, k=options.store_top_k, vocab_size=len(vocabulary), vocabulary=vocabulary.fingerprint,
        teacher=fingerprint(model), temperature=options.store_temperature, source=source, target=target,
        lengths=lengths, rank=rank, world_size=world_size,
    ) as writer:  # fmt: skip
        place = {line: i for i, line in enumerate(data.lines.tolist())}
        missing = [place[line] for line in writer.missing()]
        longest = np.maximum(data.source_lengths, data.target_lengths)
        device = next(model.parameters()).device
        with tqdm(total=len(missing), unit="sentence", disable=rank != 0) as bar:
            for rows in batches_by_length(longest[missing].tolist(), options.max_tokens):
                chosen = [missing[i] for i in rows]
                batch = data.batch(chosen).to(device)
                read, real = batch.target[:, :-1], batch.target[:, 1:] != model.pad_id
                logits = model.project(model(batch.source, batch.source_lengths, read)[real])
                log_probs = (logits.float() / options.store_temperature).log_softmax(-1)
                top = log_probs.topk(options.store_top_k)
                writer.append(data.lines[chosen], top.indices, top.values)
                bar.update(len(rows))
        if world_size > 1:
            dist.barrier()
        if rank == 0:
            writer.finish(options.output)
