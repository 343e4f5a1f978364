"""The autoregressive encoder-decoder Transformer (Vaswani 2017): teacher, baseline, and a `StepModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.models import compiled, reserved
from condgen_fast.models.compiled import CompiledState
from condgen_fast.models.layers import EncoderDecoder, KeyValue, Memory
from condgen_fast.models.reserved import ReservedState


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

    @classmethod
    def start(cls, model: Transformer, memory: Memory, beam_size: int) -> TransformerState:
        none = torch.zeros(memory.mask.shape[0], beam_size, 0, dtype=torch.bool, device=memory.mask.device)
        return cls(memory, 0, [None] * len(model.decoder.layers), none)

    def step(self, model: Transformer, tokens: Tensor) -> tuple[Tensor, TransformerState]:
        batch, beam = tokens.shape
        x = model.decoder.embedding(tokens.reshape(-1, 1), self.position).view(batch, beam, -1)
        own = torch.eye(beam, dtype=torch.bool, device=tokens.device).expand(batch, beam, beam)
        ancestors = torch.cat([self.ancestors, own], 2)
        past, memory = [], self.memory
        for layer, before, cross in zip(model.decoder.layers, self.past, memory.cross, strict=True):
            x, now = layer.step(x, ancestors[:, None], before, cross, memory.attention_mask)
            past.append(now)
        logits = model.project(model.decoder.norm(x))
        return logits, TransformerState(memory, self.position + 1, past, ancestors)

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

    def start(self, memory: Memory, beam_size: int) -> State:
        kind = CompiledState if compiled.stands_in(self.decoder) else TransformerState
        return kind.start(self, memory, beam_size)

    def reserve(self, state: State, steps: int) -> ReservedState | None:
        """The state that `start` returned, for so many steps in place.

        Keys and values of all of them get their memory at once, 2 * decoder_layers * sentences * beams * steps * width
        values, so a max_length far above what is needed takes as much more. (A base model in bfloat16, 128 sentences of
        5 beams: 7.5 MiB a step.)

        None where the CPU's kernels step, a gradient is recorded, or a module has a hook or is not ours. Raises
        ValueError for steps beyond the model's positions, or a state that has made some.
        """
        check_number(steps, "steps", minimum=1, maximum=self.max_positions, integer=True)
        if isinstance(state, CompiledState) or torch.is_grad_enabled() or not reserved.fits(self.decoder):
            return None
        if not isinstance(state, TransformerState) or state.position:
            raise ValueError("state must be one that start returned; got one that has made steps")
        return ReservedState.start(self, state.memory, state.ancestors.shape[1], steps)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens [B, K], the last token of each beam -> logits [B, K, V] of the next one."""
        return state.step(self, tokens)

    def reorder(self, state: State, parents: Tensor) -> State:
        """parents [B, K'] -> the state whose beam k continues beam parents[b, k]; K' = K of a state in place."""
        return state.reorder(parents)

    def select(self, state: State, rows: Tensor) -> State:
        """rows [R] -> the state of those sentences."""
        return state.select(rows)


State = TransformerState | CompiledState | ReservedState
