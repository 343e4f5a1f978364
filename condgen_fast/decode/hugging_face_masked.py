"""Hugging Face masked language models (BERT, RoBERTa, ModernBERT, LLaDA, ...) as masked models, used in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HuggingFaceMaskedModel(nn.Module):
    """What `adapt` returns for a model without decoder: a `MaskedModel` that sees everything but padding."""

    def __init__(self, model: nn.Module, *, mask_id: int, **ids: int | None) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if config is None or output is None:
            raise TypeError(
                f"model must be a transformers model with a language-model head; got {type(model).__name__}"
            )
        self.model = model
        self.vocab_size = output.weight.shape[0]
        self.mask_id = self._id(mask_id, "mask_id")
        self.pad_id = self._id(_first(ids["pad_id"], config, "pad_token_id"), "pad_id")
        self.bos_id = self._id(_first(ids["bos_id"], config, "bos_token_id", "cls_token_id"), "bos_id")
        self.eos_id = self._id(_first(ids["eos_id"], config, "eos_token_id", "sep_token_id"), "eos_id")
        self.max_positions = getattr(config, "max_position_embeddings", None)
        for name, module in model.named_modules():
            # RoBERTa and its kin count positions from the padding's on.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                self.max_positions = module.num_embeddings - module.padding_idx - 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fill(self, tokens: Tensor, memory: None = None) -> Tensor:
        """canvas [B, L] -> logits [B, L, V] of every position."""
        return self.model(input_ids=tokens, attention_mask=(tokens != self.pad_id).long(), return_dict=True).logits

    def _id(self, value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
            raise ValueError(f"{name} must be given as an id in [0, {self.vocab_size - 1}]; got {value!r}")
        return value


def _first(given: int | None, config: Any, *names: str) -> int | None:
    values = [given, *(getattr(config, name, None) for name in names)]
    return next((value for value in values if value is not None), None)
