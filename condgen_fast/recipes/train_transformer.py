"""Train an autoregressive Transformer, alone or with word-level knowledge distillation from a teacher.

  condgen-fast train transformer --source train.en --target train.de --valid-source valid.en --valid-target valid.de \\
      --output runs/teacher --size tiny
  torchrun --nproc-per-node 2 -m condgen_fast.cli train transformer …        # the same on two processes
  … --teacher runs/teacher --alpha 0.5 --temperature 1.0                      # word-level KD (Kim and Rush 2016)
  … --resume                                                                  # go on after a stop
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from condgen_fast.data.batching import ParallelBatch
from condgen_fast.models.checkpoint import kind, load_model
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer
from condgen_fast.ops import kd_loss
from condgen_fast.recipes.evaluation import bleu_of
from condgen_fast.recipes.training import ModelOptions, Run, TrainingOptions, prepare_data


@dataclass(kw_only=True)
class TrainTransformer(ModelOptions, TrainingOptions):
    """Train an autoregressive Transformer."""

    teacher: Path | None = None
    """model folder of an autoregressive teacher with the same vocabulary: word-level KD"""
    alpha: float = 0.5
    """share of the distillation term; 1 is word-level KD alone"""
    temperature: float = 1.0
    """softmax temperature of teacher and student in the distillation term"""


def main(options: TrainTransformer) -> None:
    vocabulary, train, valid = prepare_data(options)
    torch.manual_seed(options.seed)
    model = Transformer(TransformerConfig(**options.model_fields(), vocab_size=len(vocabulary)))

    teacher = None
    if options.teacher is not None:
        teacher, teacher_vocabulary = load_model(options.teacher)
        if kind(teacher) != "transformer":
            raise ValueError(
                f"teacher must be an autoregressive transformer; got a {kind(teacher)} in {options.teacher}"
            )
        if teacher_vocabulary.fingerprint != vocabulary.fingerprint:
            raise ValueError(f"teacher {options.teacher} has another vocabulary; pass --vocabulary from its folder")

    def loss(model: Transformer, batch: ParallelBatch) -> dict[str, Tensor]:
        # Teacher forcing: the decoder reads bos … last token and predicts first token … eos; only real positions
        # are projected, padding never reaches the vocabulary.
        read, predict = batch.target[:, :-1], batch.target[:, 1:]
        real = predict != model.pad_id
        logits = model.project(model(batch.source, batch.source_lengths, read)[real])
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher.to(logits.device)
                teacher_logits = teacher.project(teacher(batch.source, batch.source_lengths, read)[real])
        value = kd_loss(
            logits, teacher_logits, predict[real], alpha=options.alpha if teacher is not None else 0.0,
            temperature=options.temperature, label_smoothing=options.label_smoothing,
        )  # fmt: skip
        return {"loss": value}

    run = Run(options, model, vocabulary, loss)
    for batch in run.batches(train):
        if run.step(batch):
            run.save(run.valid_loss(valid) | {"valid_bleu": bleu_of(run.model, vocabulary, valid, "greedy")})
    run.finish()
