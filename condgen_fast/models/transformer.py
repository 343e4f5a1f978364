"""The autoregressive encoder-decoder Transformer (Vaswani 2017): teacher, baseline, and a `StepModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condgen_fast.models.layers import EncoderDecoder, KeyValue, Memory


@dataclass(frozen=True)
class TransformerState:
    """Where a batch of beams stands; `past` holds each layer's keys and values [B*K, heads, t, D/heads]."""

    memory: Memory
    beam_size: int
    position: int
    past: list[KeyValue | None]


class Transformer(EncoderDecoder):
    """Encoder-decoder with a causal decoder; `forward` is teacher forcing, the `StepModel` methods decode."""

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Hidden states [B, T, D] that predict the token after each of `target` [B, T]; `project` makes them logits.

        Pads stand on the right, so the causal mask alone keeps them out of every real position.
        """
        return self.decoder(target, self.encode(source, source_lengths), mask=None, causal=True)

    def start(self, memory: Memory, beam_size: int) -> TransformerState:
        return TransformerState(memory, beam_size, 0, [None] * len(self.decoder.layers))

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """tokens [B, K], the last token of each beam -> logits [B, K, V] of the next one."""
        batch, beam = tokens.shape
        x = self.decoder.embedding(tokens.reshape(-1, 1), state.position).view(batch, beam, -1)
        past, memory = [], state.memory
        for layer, before, cross in zip(self.decoder.layers, state.past, memory.cross, strict=True):
            x, now = layer.step(x, before, cross, memory.attention_mask)
            past.append(now)
        logits = self.project(self.decoder.norm(x))
        return logits, replace(state, position=state.position + 1, past=past)

    def reorder(self, state: TransformerState, parents: Tensor) -> TransformerState:
        """parents [B, K'] -> the state whose beam k continues beam parents[b, k]."""
        batch, beam = parents.shape
        first = torch.arange(batch, device=parents.device)[:, None] * state.beam_size
        rows = (first + parents).reshape(-1)
        past = [kv.select(rows) if kv is not None else None for kv in state.past]
        return replace(state, beam_size=beam, past=past)

    def select(self, state: TransformerState, rows: Tensor) -> TransformerState:
        """rows [R] -> the state of those sentences."""
        beams = torch.arange(state.beam_size, device=rows.device)
        flat = (rows[:, None] * state.beam_size + beams).reshape(-1)
        past = [kv.select(flat) if kv is not None else None for kv in state.past]
        return replace(state, memory=state.memory.select(rows), past=past)
