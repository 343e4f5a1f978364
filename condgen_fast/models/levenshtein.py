"""The Levenshtein Transformer (Gu 2019): deletion, placeholder and token heads over one canvas; an `EditModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from condgen_fast.models.canvas import CanvasPass, head, linear
from condgen_fast.models.layers import Decoder, EncoderDecoder, TransformerConfig, without_hooks


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
class EditMemory:
    """A memory for each head; heads that read the same layers of the same decoder share one."""

    token: CanvasPass
    deletion: CanvasPass
    insertion: CanvasPass

    def select(self, rows: Tensor) -> EditMemory:
        chosen = {id(each): each.select(rows) for each in (self.token, self.deletion, self.insertion)}
        return EditMemory(*(chosen[id(each)] for each in (self.token, self.deletion, self.insertion)))


class LevenshteinTransformer(EncoderDecoder):
    """Encoder and bidirectional decoder with the three heads pi_del, pi_plh and pi_tok of the paper."""

    config_class = LevenshteinConfig
    capturable = property(without_hooks)

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
        source_memory = super().encode(source, source_lengths)
        token = CanvasPass.start(self.decoder, None, source_memory)

        def start(decoder: Decoder | None, depth: int | None) -> CanvasPass:
            if decoder is None:
                whole = depth in (None, self.config.decoder_layers)
                return token if whole else CanvasPass.start(self.decoder, depth, source_memory)
            return CanvasPass.start(decoder, None, replace(source_memory, cross=decoder.remember(source_memory.states)))

        deletion = start(self.deletion_decoder, self.config.deletion_layers)
        if self.shares_edit_states:
            return EditMemory(token, deletion, deletion)
        return EditMemory(token, deletion, start(self.insertion_decoder, self.config.insertion_layers))

    @property
    def shares_edit_states(self) -> bool:
        """Whether the deletion and the placeholder head read the same states of a canvas."""
        config = self.config
        depths = {depth or config.decoder_layers for depth in (config.deletion_layers, config.insertion_layers)}
        return config.share_decoder and len(depths) == 1

    def edit_states(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] -> states [B, L, D] that, where `shares_edit_states`, both heads read."""
        return memory.deletion.states(self, tokens)

    def delete_head(self, states: Tensor) -> Tensor:
        """states [B, L, D] -> [B, L, 2], class 1 = delete."""
        return head(self.deletion_head, states)

    def insert_head(self, states: Tensor) -> Tensor:
        """states [B, L, D] -> [B, L-1, max_insert+1]: how many placeholders go between positions i and i+1."""
        return head(self.insertion_head, torch.cat([states[:, :-1], states[:, 1:]], dim=-1))

    def delete_logits(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] -> [B, L, 2], class 1 = delete."""
        return self.delete_head(memory.deletion.states(self, tokens))

    def insert_logits(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] -> [B, L-1, max_insert+1]: how many placeholders go between positions i and i+1."""
        return self.insert_head(memory.insertion.states(self, tokens))

    def fill_states(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """Decoder states [B, L, D] that `project` turns into token logits."""
        return memory.token.states(self, tokens)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return linear(hidden, self.output_weight)

    def fill(self, tokens: Tensor, memory: EditMemory) -> Tensor:
        """canvas [B, L] with placeholders -> logits [B, L, V] of every position."""
        return self.project(self.fill_states(tokens, memory))

    def select(self, memory: EditMemory, rows: Tensor) -> EditMemory:
        """rows [R], repeats allowed -> the memory of those sentences."""
        return memory.select(rows)


def _with_layers(config: LevenshteinConfig, layers: int | None) -> LevenshteinConfig:
    return replace(config, decoder_layers=layers or config.decoder_layers, deletion_layers=None, insertion_layers=None)
