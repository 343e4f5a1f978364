"""The Levenshtein Transformer (Gu 2019): deletion, placeholder and token heads over one canvas; an `EditModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from condgen_fast.models.layers import Decoder, EncoderDecoder, KeyValue, Memory, TransformerConfig


@dataclass(frozen=True)
class LevenshteinConfig(TransformerConfig):
    # A slot can take at most this many placeholders in one iteration.
    max_insert: int = 255
    # Decoder layers that the deletion and the placeholder head run (None: all); the token head always runs all.
    deletion_layers: int | None = None
    insertion_layers: int | None = None
    # False gives the deletion and the placeholder head a decoder of their own.
    share_decoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("deletion_layers", "insertion_layers"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.decoder_layers:
                raise ValueError(f"{name} must be in [1, decoder_layers={self.decoder_layers}]; got {value}")


@dataclass(frozen=True)
class EditMemory(Memory):
    """A memory that also holds the cross-attention keys of the deletion and the placeholder decoder."""

    deletion_cross: list[KeyValue]
    insertion_cross: list[KeyValue]

    def select(self, rows: Tensor) -> EditMemory:
        base = super().select(rows)
        shared = self.deletion_cross is self.cross
        return EditMemory(
            base.states,
            base.mask,
            base.cross,
            base.cross if shared else [kv.select(rows) for kv in self.deletion_cross],
            base.cross if shared else [kv.select(rows) for kv in self.insertion_cross],
        )


class LevenshteinTransformer(EncoderDecoder):
    """Encoder and bidirectional decoder with the three heads pi_del, pi_plh and pi_tok of the paper."""

    config_class = LevenshteinConfig

    def __init__(self, config: LevenshteinConfig):
        super().__init__(config)
        self.deletion_head = nn.Linear(config.width, 2)
        self.insertion_head = nn.Linear(2 * config.width, config.max_insert + 1)
        self.deletion_decoder = self.insertion_decoder = None
        if not config.share_decoder:  # only the layers that run: DDP refuses parameters without a gradient
            self.deletion_decoder, self.insertion_decoder = (
                Decoder(_with_layers(config, layers), self.decoder.embedding)
                for layers in (config.deletion_layers, config.insertion_layers)
            )

    def encode(self, source: Tensor, source_lengths: Tensor) -> EditMemory:
        memory = super().encode(source, source_lengths)
        if self.config.share_decoder:
            return EditMemory(memory.states, memory.mask, memory.cross, memory.cross, memory.cross)
        return EditMemory(
            memory.states,
            memory.mask,
            memory.cross,
            self.deletion_decoder.remember(memory.states),
            self.insertion_decoder.remember(memory.states),
        )

    def delete_logits(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] -> [B, L, 2], class 1 = delete."""
        decoder = self.deletion_decoder or self.decoder
        hidden = self._states(decoder, tokens, memory, memory.deletion_cross, self.config.deletion_layers)
        return self.deletion_head(hidden)

    def insert_logits(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] -> [B, L-1, max_insert+1]: how many placeholders go between positions i and i+1."""
        decoder = self.insertion_decoder or self.decoder
        hidden = self._states(decoder, tokens, memory, memory.insertion_cross, self.config.insertion_layers)
        return self.insertion_head(torch.cat([hidden[:, :-1], hidden[:, 1:]], dim=-1))

    def fill_states(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """Decoder states [B, L, D] that `project` turns into token logits."""
        return self._states(self.decoder, tokens, memory, memory.cross, None)

    def fill(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] with placeholders -> logits [B, L, V] of every position."""
        return self.project(self.fill_states(tokens, memory))

    def select(self, memory: EditMemory, rows: Tensor) -> EditMemory:
        """rows [R], repeats allowed -> the memory of those sentences."""
        return memory.select(rows)

    def _states(
        self, decoder: Decoder, tokens: Tensor, memory: Memory, cross: list[KeyValue], depth: int | None
    ) -> Tensor:
        mask = (tokens != self.pad_id)[:, None, None, :]
        return decoder(tokens, Memory(memory.states, memory.mask, cross), mask, causal=False, depth=depth)


def _with_layers(config: LevenshteinConfig, layers: int | None) -> LevenshteinConfig:
    return replace(config, decoder_layers=layers or config.decoder_layers, deletion_layers=None, insertion_layers=None)
