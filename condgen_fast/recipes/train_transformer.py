"""Train an autoregressive Transformer, alone or with a distribution to follow beside the labels.

  condgen-fast train transformer --source train.en --target train.de --valid-source valid.en --valid-target valid.de \\
      --output runs/teacher --size tiny
  torchrun --nproc-per-node 2 -m condgen_fast.cli train transformer …        # the same on two processes
  … --teacher runs/teacher --alpha 0.5 --temperature 1.0       # word-level KD and NLL (Kim and Rush 2016)
  … --teacher runs/teacher --alpha 1                         # word-level KD alone
  … --teacher runs/teacher --top-k 64 --tail uniform         # from the teacher's 64 best tokens
  … --teacher-store teacher.store                            # those, stored by distill --store-top-k
  … --d2gpo-embeddings runs/teacher                          # a prior around each label (Li 2020)
  … --resume                                                 # go on after a stop
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.data.batching import ParallelBatch, ParallelDataset
from condgen_fast.data.teacher_store import TeacherStore
from condgen_fast.data.text import read_parallel
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.losses.d2gpo import SHAPES, d2gpo_loss, d2gpo_prior, read_embeddings
from condgen_fast.models.checkpoint import fingerprint, kind, load_model
from condgen_fast.models.layers import EncoderDecoder, TransformerConfig
from condgen_fast.models.transformer import Transformer
from condgen_fast.ops import LabelPrior, TopK, kd_loss
from condgen_fast.ops.kd_loss.checks import DIVERGENCES
from condgen_fast.ops.kd_loss.teachers import TAILS
from condgen_fast.recipes.training import ModelOptions, Run, TrainingOptions, choose_device, prepare_data


@dataclass(kw_only=True)
class TrainTransformer(ModelOptions, TrainingOptions):
    """Train an autoregressive Transformer."""

    teacher: Path | None = None
    """model folder of an autoregressive teacher with the same vocabulary: word-level KD"""
    teacher_store: Path | None = None
    """word-level KD without the teacher: what distill --store-top-k wrote for the same text and vocabulary;
    validation, whose text is not in it, then takes the negative log-likelihood alone"""
    top_k: int | None = None
    """with --teacher: keep its most probable tokens only, so many"""
    tail: str = "uniform"
    """of a teacher's other tokens: uniform (they share the rest), drop or renormalise"""
    divergence: str = "forward_kl"
    """between teacher and student: cross_entropy, forward_kl, reverse_kl, jsd or tvd"""
    alpha: float = 0.5
    """share of the distillation term; 1 is word-level KD alone"""
    temperature: float = 1.0
    """softmax temperature of teacher and student in the distillation term"""
    d2gpo_embeddings: Path | None = None
    """D2GPo: a model folder with the same vocabulary, or a text file of vectors (word2vec, fastText)"""
    d2gpo_alpha: float = 0.1
    """D2GPo: weight of the prior's term, which the square of its temperature multiplies"""
    d2gpo_temperature: float = 2.0
    """D2GPo: softmax temperature of the prior"""
    d2gpo_shape: str = "gaussian"
    """D2GPo: gaussian, linear or cosine, of a token's rank by similarity to the label"""
    d2gpo_sigma: float = 1.0
    """D2GPo: standard deviation of the Gaussian, in ranks"""
    d2gpo_width: int = 200
    """D2GPo: ranks that count"""
    d2gpo_truncate: bool = False
    """D2GPo: nothing for tokens beyond those ranks, instead of exp(0)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("teacher", "teacher_store", "d2gpo_embeddings") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of teacher, teacher_store and d2gpo_embeddings; got {' and '.join(given)}")
        if self.top_k is not None and self.teacher is None:
            raise ValueError(f"top_k must be left out without --teacher; got {self.top_k}")
        check_choice(self.tail, "tail", TAILS)
        check_choice(self.divergence, "divergence", DIVERGENCES)
        check_number(self.alpha, "alpha", minimum=0, maximum=1)
        check_number(self.temperature, "temperature", minimum=0, exclusive=True)
        check_choice(self.d2gpo_shape, "d2gpo_shape", SHAPES)
        check_number(self.d2gpo_alpha, "d2gpo_alpha", minimum=0, maximum=1)
        for name in ("d2gpo_temperature", "d2gpo_sigma"):
            check_number(getattr(self, name), name, minimum=0, exclusive=True)
        check_number(self.d2gpo_width, "d2gpo_width", minimum=1, integer=True)
        distilled = self.teacher is not None or self.teacher_store is not None
        self._refuse_unused(("divergence", "alpha", "temperature"), distilled, "--teacher or --teacher-store")
        listed = self.top_k is not None or self.teacher_store is not None
        self._refuse_unused(("tail",), listed, "--top-k or --teacher-store")
        of_prior = [field.name for field in fields(self) if field.name.startswith("d2gpo_")]
        self._refuse_unused(of_prior, self.d2gpo_embeddings is not None, "--d2gpo-embeddings")

    def _refuse_unused(self, names: Sequence[str], used: bool, by: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if not used and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} must be left out without {by}; got {getattr(self, name)}")


def main(options: TrainTransformer) -> None:
    vocabulary, train, valid = prepare_data(options)
    torch.manual_seed(options.seed)
    model = Transformer(TransformerConfig(**options.model_fields(), vocab_size=len(vocabulary)))
    teacher = store = prior = None
    followed = ""  # its fingerprint
    if options.teacher is not None:
        teacher = load_same_vocabulary(options.teacher, "teacher", vocabulary)
        if kind(teacher) != "transformer":
            raise ValueError(
                f"teacher must be an autoregressive transformer; got a {kind(teacher)} in {options.teacher}"
            )
        if options.max_length + 1 > teacher.max_positions:
            raise ValueError(
                f"max_length must be below the teacher's {teacher.max_positions} positions; got {options.max_length}"
            )
        if options.top_k is not None:
            check_number(options.top_k, "top_k", minimum=1, maximum=len(vocabulary), integer=True)
        followed = fingerprint(teacher)
    if options.teacher_store is not None:
        store = open_store(options, vocabulary, train)
        followed = store.fingerprint
    if options.d2gpo_embeddings is not None:
        prior, followed = build_prior(options, vocabulary)

    def distillation_teacher(model: Transformer, batch: ParallelBatch, read: Tensor, real: Tensor):
        """What the real positions are to be distilled from, and its own temperature; None for labels alone."""
        if teacher is not None:
            with torch.no_grad():
                teacher.to(read.device)
                logits = teacher.project(teacher(batch.source, batch.source_lengths, read)[real])
            if options.top_k is None:
                return logits, options.temperature
            top = logits.float().log_softmax(-1).topk(options.top_k)
            return TopK(top.indices, top.values, options.tail), options.temperature
        if store is not None and model.training:
            ids, log_probs = store.read(train.lines[batch.indices.cpu().numpy()])
            top = TopK(ids.to(read.device), log_probs.to(read.device), options.tail)
            return top, options.temperature / store.temperature
        return None, None

    def loss(model: Transformer, batch: ParallelBatch) -> dict[str, Tensor]:
        # Teacher forcing: the decoder reads bos … last token and predicts first token … eos; only real positions
        # are projected, padding never reaches the vocabulary.
        read, predict = batch.target[:, :-1], batch.target[:, 1:]
        real = predict != model.pad_id
        logits = model.project(model(batch.source, batch.source_lengths, read)[real])
        if prior is not None:
            value = d2gpo_loss(
                logits, prior, predict[real], alpha=options.d2gpo_alpha, temperature=options.d2gpo_temperature,
                label_smoothing=options.label_smoothing,
            )  # fmt: skip
            return {"loss": value}
        soft_target, teacher_temperature = distillation_teacher(model, batch, read, real)
        value = kd_loss(
            logits, soft_target, predict[real], alpha=options.alpha if soft_target is not None else 0.0,
            temperature=options.temperature, teacher_temperature=teacher_temperature, divergence=options.divergence,
            label_smoothing=options.label_smoothing,
        )  # fmt: skip
        return {"loss": value}

    run = Run(options, model, vocabulary, loss, followed)
    for batch in run.batches(train):
        if run.step(batch):
            run.save(run.validate(valid, "greedy"))
    run.finish()


def load_same_vocabulary(folder: Path, name: str, vocabulary: Vocabulary) -> EncoderDecoder:
    """The model of a folder; ValueError unless its vocabulary is this one."""
    model, its_vocabulary = load_model(folder)
    if its_vocabulary.fingerprint != vocabulary.fingerprint:
        raise ValueError(f"{name} {folder} has another vocabulary; pass --vocabulary from its folder")
    return model


def open_store(options: TrainTransformer, vocabulary: Vocabulary, train: ParallelDataset) -> TeacherStore:
    """The teacher store, once it is known to hold every token of the training data."""
    store = TeacherStore(options.teacher_store)
    source, target = read_parallel(options.source, options.target)
    store.check(vocabulary=vocabulary.fingerprint, source=source, target=target)
    wrong = store.lengths[train.lines] != train.target_lengths - 1
    if wrong.any():
        line = int(train.lines[wrong.argmax()])
        raise ValueError(
            f"teacher store {store.path} has {store.lengths[line]} tokens of line {line + 1}, which has"
            f" {train.target_lengths[wrong.argmax()] - 1}: longer than its teacher reads; lower --max-length"
        )
    return store


def build_prior(options: TrainTransformer, vocabulary: Vocabulary) -> tuple[LabelPrior, str]:
    """The D2GPo prior from a trained model's embeddings, or from given vectors, and their fingerprint."""
    path = options.d2gpo_embeddings
    if path.is_file():
        embeddings = read_embeddings(path, vocabulary.pieces(range(len(vocabulary))))
    else:
        model = load_same_vocabulary(path, "d2gpo_embeddings", vocabulary)
        embeddings = model.decoder.embedding.tokens.weight.detach()
    prior = d2gpo_prior(
        embeddings.to(choose_device(options.device)), width=options.d2gpo_width, shape=options.d2gpo_shape,
        sigma=options.d2gpo_sigma, temperature=options.d2gpo_temperature, truncate=options.d2gpo_truncate,
        unlisted=(vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.mask_id),
    )  # fmt: skip
    return prior, hashlib.sha256(embeddings.float().numpy().tobytes()).hexdigest()
