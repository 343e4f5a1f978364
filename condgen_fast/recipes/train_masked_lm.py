"""Train a masked-diffusion language model that continues a prompt: here, a source sentence by its translation.

  condgen-fast train masked_lm --source train.en --target distilled.de --valid-source valid.en \\
      --valid-target valid.de --output runs/masked-lm --size tiny --block-length 16
  echo "Open the file." | condgen-fast translate --model runs/masked-lm --policy entropy --threshold 0.2

There is no encoder: the source and its eos are the prompt, the target and its eos the response.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from condgen_fast.decode import BlockDiffusion
from condgen_fast.losses.masked_lm import masked_lm_loss
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig
from condgen_fast.recipes.training import ModelOptions, Run, TrainingOptions, prepare_data


@dataclass(kw_only=True)
class TrainMaskedLM(ModelOptions, TrainingOptions):
    """Train a masked-diffusion language model (block diffusion); its depth is `encoder_layers`."""

    block_length: int | None = None
    """positions of a block, which sees itself and what is before it; by default every position sees the whole canvas"""
    label_smoothing: float = 0.0
    """share of the target spread over the vocabulary; 0 keeps the loss a bound on the likelihood"""
    valid_threshold: float = 0.9
    """confidence threshold of the validation BLEU's decoding"""

    config_class = MaskedLMConfig

    def model_fields(self) -> dict[str, object]:
        return super().model_fields() | {"block_length": self.block_length}


def main(options: TrainMaskedLM) -> None:
    strategy = BlockDiffusion(threshold=options.valid_threshold)
    vocabulary, train, valid = prepare_data(options)
    torch.manual_seed(options.seed)
    model = MaskedLM(MaskedLMConfig(**options.model_fields(), vocab_size=len(vocabulary)))
    loss = partial(masked_lm_loss, label_smoothing=options.label_smoothing)

    run = Run(options, model, vocabulary, loss)
    for batch in run.batches(train):
        if run.step(batch):
            run.save(run.validate(valid, strategy))
    run.finish()
