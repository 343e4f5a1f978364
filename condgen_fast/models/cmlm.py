"""The conditional masked language model of Mask-Predict (Ghazvininejad 2019): a `FillModel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condgen_fast.models.canvas import CanvasPass, head, linear
from condgen_fast.models.layers import EncoderDecoder, TransformerConfig, without_hooks


@dataclass(frozen=True)
class CMLMConfig(TransformerConfig):
    # The length head classifies target length minus source length, clamped to this many tokens either way.
    length_offset: int = 64


class CMLM(EncoderDecoder):
    """Encoder, bidirectional decoder over a canvas with masks, and a head that predicts the target's length."""

    config_class = CMLMConfig
    capturable = property(without_hooks)

    def __init__(self, config: CMLMConfig):
        super().__init__(config)
        self.length_head = nn.Linear(config.width, 2 * config.length_offset + 1)

    def encode(self, source: Tensor, source_lengths: Tensor) -> CanvasPass:
        return CanvasPass.start(self.decoder, None, super().encode(source, source_lengths))

    def length_offset_logits(self, memory: CanvasPass) -> Tensor:
        """Logits [B, 2R+1] of the target's length minus the source's, from the mean of the real source states."""
        mask = memory.source.mask[..., None]
        # A masked mean: the published code averages over padding too, which makes lengths depend on the batch.
        mean = (memory.source.states * mask).sum(1) / mask.sum(1)
        return head(self.length_head, mean)

    def length_logits(self, memory: CanvasPass) -> Tensor:
        """Logits [B, Lmax] of the target's length (bos and eos not counted), index = length; length 0 is impossible."""
        radius = self.config.length_offset
        offsets = self.length_offset_logits(memory)
        lengths = torch.arange(self.config.max_positions - 1, device=offsets.device)
        index = lengths - memory.source.mask.sum(1)[:, None] + radius  # [B, Lmax]
        legal = (index >= 0) & (index <= 2 * radius) & (lengths >= 1)
        return offsets.gather(1, index.clamp(0, 2 * radius)).masked_fill(~legal, -torch.inf)

    def fill_states(self, tokens: Tensor, memory: CanvasPass) -> Tensor:
        """Decoder states [B, L, D] of a canvas [B, L] bos … eos, padded on the right."""
        return memory.states(self, tokens)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return linear(hidden, self.output_weight)

    def fill(self, tokens: Tensor, memory: CanvasPass) -> Tensor:
        """canvas [B, L] -> logits [B, L, V] of every position."""
        return self.project(self.fill_states(tokens, memory))

    def select(self, memory: CanvasPass, rows: Tensor) -> CanvasPass:
        """rows [R], repeats allowed -> the memory of those sentences."""
        return memory.select(rows)

    def forward(self, source: Tensor, source_lengths: Tensor, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """Training pass: decoder states [B, L, D] of the canvas and length offset logits [B, 2R+1]."""
        memory = self.encode(source, source_lengths)
        return self.fill_states(canvas, memory), self.length_offset_logits(memory)
