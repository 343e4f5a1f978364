"""Train the Levenshtein Transformer by imitation of the edit oracle, best on a teacher's translations.

  condgen-fast train levenshtein --source train.en --target distilled.de \\
      --valid-source valid.en --valid-target valid.de \\
      --vocabulary runs/teacher/vocab.model --initialize-from runs/teacher --output runs/levenshtein --size tiny

The defaults are the published training (insertion learns from gold with words dropped, deletion from the model's own
insertion); --alpha and --beta are the paper's mixing probabilities, --full-mask trains a share from the empty canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from condgen_fast._check import check_number
from condgen_fast.decode import LevenshteinRefinement
from condgen_fast.losses.levenshtein import Policy, levenshtein_loss
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer
from condgen_fast.recipes.training import ModelOptions, Run, TrainingOptions, initialize, prepare_data


@dataclass(kw_only=True)
class TrainLevenshtein(ModelOptions, TrainingOptions):
    """Train a Levenshtein Transformer."""

    alpha: float = 0.0
    """share of deletion canvases that are the initial sequence instead of the model's own insertion"""
    beta: float = 0.0
    """share of insertion canvases that are the oracle's deletion of the initial sequence instead of gold with drops"""
    full_mask: float = 0.0
    """share of insertion canvases that are empty (bos eos), as decoding from scratch starts"""
    initial_noise: float = 0.0
    """share of gold words replaced at random in the initial sequence; 0 makes it empty"""
    deletion_layers: int | None = None
    """decoder layers that the deletion head runs (an early exit makes decoding faster); all by default"""
    insertion_layers: int | None = None
    """decoder layers that the placeholder head runs; all by default"""
    share_decoder: bool = True
    """one decoder for the three heads"""
    initialize_from: Path | None = None
    """model folder (an autoregressive teacher of the same shape) whose weights of the same name are the start"""

    config_class = LevenshteinConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "full_mask", "initial_noise"):
            check_number(getattr(self, name), name, minimum=0, maximum=1)

    def model_fields(self) -> dict[str, object]:
        own = ("share_decoder", "deletion_layers", "insertion_layers")
        return super().model_fields() | {name: getattr(self, name) for name in own}


def main(options: TrainLevenshtein) -> None:
    vocabulary, train, valid = prepare_data(options)
    torch.manual_seed(options.seed)
    model = LevenshteinTransformer(LevenshteinConfig(**options.model_fields(), vocab_size=len(vocabulary)))
    if options.initialize_from is not None:
        initialize(model, vocabulary, options.initialize_from)
    policy = Policy(options.alpha, options.beta, options.full_mask, options.initial_noise)
    loss = partial(levenshtein_loss, label_smoothing=options.label_smoothing, policy=policy)

    run = Run(options, model, vocabulary, loss)
    for batch in run.batches(train):
        if run.step(batch):
            run.save(run.validate(valid, LevenshteinRefinement()))
    run.finish()
