"""Train the conditional masked language model that Mask-Predict decodes, best on a teacher's translations.

  condgen-fast distill --model runs/teacher --source train.en --output distilled.de
  condgen-fast train cmlm --source train.en --target distilled.de --valid-source valid.en --valid-target valid.de \\
      --vocabulary runs/teacher/vocab.model --initialize-from runs/teacher --output runs/cmlm --size tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from condgen_fast._check import check_number
from condgen_fast.decode import MaskPredict
from condgen_fast.losses.cmlm import cmlm_loss
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.recipes.training import ModelOptions, Run, TrainingOptions, initialize, prepare_data


@dataclass(kw_only=True)
class TrainCMLM(ModelOptions, TrainingOptions):
    """Train a conditional masked language model (Mask-Predict)."""

    length_weight: float = 0.1
    """weight of the length head's loss beside the tokens' loss"""
    initialize_from: Path | None = None
    """model folder (an autoregressive teacher of the same shape) whose weights of the same name are the start"""
    valid_iterations: int = 4
    """Mask-Predict iterations of the validation BLEU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.length_weight, "length_weight", minimum=0)
        check_number(self.valid_iterations, "valid_iterations", minimum=1, integer=True)


def main(options: TrainCMLM) -> None:
    vocabulary, train, valid = prepare_data(options)
    torch.manual_seed(options.seed)
    model = CMLM(CMLMConfig(**options.model_fields(), vocab_size=len(vocabulary)))
    if options.initialize_from is not None:
        initialize(model, vocabulary, options.initialize_from)
    loss = partial(cmlm_loss, label_smoothing=options.label_smoothing, length_weight=options.length_weight)
    strategy = MaskPredict(iterations=options.valid_iterations)

    run = Run(options, model, vocabulary, loss)
    for batch in run.batches(train):
        if run.step(batch):
            run.save(run.validate(valid, strategy))
    run.finish()
