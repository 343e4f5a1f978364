"""The autoregressive encoder-decoder Transformer (Vaswani 2017): teacher, baseline, and a `StepModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condgen_fast.models import compiled
from condgen_fast.models.compiled import CompiledState
from condgen_fast.models.layers import EncoderDecoder, KeyValue, Memory


@dataclass(frozen=True)
class TransformerState:
    """Where a batch of beams stands, where the modules themselves decode.

    All beams' tokens of a sentence share its keys and values: a beam looks at those that `ancestors` says are its own,
    so that beams part and join without anything in the cache being moved.
    """

    memory: Memory
    position: int
    past: list[KeyValue | None]  # per layer [B, heads, tokens so far, D / heads]
    ancestors: Tensor  # bool [B, K, tokens so far]

    def reorder(self, parents: Tensor) -> TransformerState:
        index = parents[:, :, None].expand(-1, -1, self.ancestors.shape[2])
        return replace(self, ancestors=self.ancestors.gather(1, index))

    def select(self, rows: Tensor) -> TransformerState:
        past = [kv.select(rows) if kv is not None else None for kv in self.past]
        return replace(self, memory=self.memory.select(rows), past=past, ancestors=self.ancestors.index_select(0, rows))


class Transformer(EncoderDecoder):
    """Encoder-decoder with a causal decoder; `forward` is teacher forcing, the `StepModel` methods decode."""

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Hidden states [B, T, D] that predict the token after each of `target` [B, T]; `project` makes them logits.

        Pads stand on the right, so the causal mask alone keeps them out of every real position.
        """
        return self.decoder(target, self.encode(source, source_lengths), mask=None, causal=True)

    def force(self, target: Tensor, memory: Memory) -> Tensor:
        """Logits [B, n, T, V] that follow each token of the targets [B, n, T] (bos first), n for each sentence."""
        batch, n, length = target.shape
        rows = torch.arange(batch, device=target.device).repeat_interleave(n)
        hidden = self.decoder(target.view(-1, length), memory.select(rows), mask=None, causal=True)
        return self.project(hidden).view(batch, n, length, -1)

    def start(self, memory: Memory, beam_size: int) -> TransformerState | CompiledState:
        if compiled.stands_in(self.decoder):
            return CompiledState.start(self, memory, beam_size)
        none = torch.zeros(memory.mask.shape[0], beam_size, 0, dtype=torch.bool, device=memory.mask.device)
        return TransformerState(memory, 0, [None] * len(self.decoder.layers), none)

    def step(
        self, tokens: Tensor, state: TransformerState | CompiledState
    ) -> tuple[Tensor, TransformerState | CompiledState]:
        """tokens [B, K], the last token of each beam -> logits [B, K, V] of the next one."""
        if isinstance(state, CompiledState):
            return state.step(self, tokens)
        batch, beam = tokens.shape
        x = self.decoder.embedding(tokens.reshape(-1, 1), state.position).view(batch, beam, -1)
        own = torch.eye(beam, dtype=torch.bool, device=tokens.device).expand(batch, beam, beam)
        ancestors = torch.cat([state.ancestors, own], 2)
        past, memory = [], state.memory
        for layer, before, cross in zip(self.decoder.layers, state.past, memory.cross, strict=True):
            x, now = layer.step(x, ancestors[:, None], before, cross, memory.attention_mask)
            past.append(now)
        logits = self.project(self.decoder.norm(x))
        return logits, TransformerState(memory, state.position + 1, past, ancestors)

    def reorder(self, state: TransformerState | CompiledState, parents: Tensor) -> TransformerState | CompiledState:
        """parents [B, K'] -> the state whose beam k continues beam parents[b, k]."""
        return state.reorder(parents)

    def select(self, state: TransformerState | CompiledState, rows: Tensor) -> TransformerState | CompiledState:
        """rows [R] -> the state of those sentences."""
        return state.select(rows)
