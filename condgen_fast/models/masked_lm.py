"""A masked-diffusion language model without encoder (Nie et al. 2025; Arriola et al. 2025): a `MaskedModel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condgen_fast._check import check_number
from condgen_fast.models import compiled
from condgen_fast.models.canvas import linear
from condgen_fast.models.layers import Embedding, EncoderLayer, KeyValue, TransformerConfig, attend, without_hooks


@dataclass(frozen=True)
class MaskedLMConfig(TransformerConfig):
    """`encoder_layers` is the depth; `decoder_layers` is not read."""

    # A token sees its own block of this many positions and all before it; None: the whole canvas.
    block_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length is not None:
            check_number(self.block_length, "block_length", minimum=1, integer=True)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer at every position of R canvases; `extend` writes into them."""

    layers: list[KeyValue]  # [R, heads, W, D / heads] each


class MaskedLM(nn.Module):
    """One bidirectional or block-causal Transformer stack over prompt and masks, with tied embeddings."""

    config_class = MaskedLMConfig
    capturable = property(without_hooks)

    def __init__(self, config: MaskedLMConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.output_weight = (
            self.embedding.tokens.weight
            if config.tie_embeddings
            else nn.Parameter(torch.randn(config.vocab_size, config.width) * config.width**-0.5)
        )
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.block_length = config.block_length
        self.pad_id, self.unk_id, self.mask_id = config.pad_id, config.unk_id, config.mask_id
        self.bos_id, self.eos_id = config.bos_id, config.eos_id

    def fill_states(self, tokens: Tensor, memory: None = None) -> Tensor:
        """States [B, L, D] of a canvas [B, L] of tokens and masks, padded on the right."""
        # A canvas of padding alone still shows its first position, so that attention has something to divide by.
        if self.block_length is None and compiled.stands_in(self.embedding, self.layers, self.norm):
            return compiled.encode(self, tokens, (tokens != self.pad_id).sum(1).clamp(min=1))
        mask = (torch.arange(tokens.shape[1], device=tokens.device) == 0) | (tokens != self.pad_id)
        mask = mask[:, None, None, :]
        if self.block_length is not None:
            block = torch.arange(tokens.shape[1], device=tokens.device) // self.block_length
            mask = mask & (block <= block[:, None])
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def project(self, states: Tensor) -> Tensor:
        """states [..., D] -> logits [..., V]."""
        return linear(states, self.output_weight)

    def fill(self, tokens: Tensor, memory: None = None) -> Tensor:
        """canvas [B, L] -> logits [B, L, V] of every position."""
        return self.project(self.fill_states(tokens))

    def prefix(self, rows: int, width: int) -> Prefix:
        """Room for the keys and values of `rows` canvases of `width` positions."""
        heads, weight = self.config.heads, self.output_weight
        shape = (rows, heads, width, self.config.width // heads)
        return Prefix([KeyValue(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers])

    def select(self, prefix: Prefix, rows: Tensor) -> Prefix:
        """rows [R], repeats allowed -> the prefix of those canvases."""
        return Prefix([kv.select(rows) for kv in prefix.layers])

    def extend(self, tokens: Tensor, start: Tensor, prefix: Prefix) -> Tensor:
        """States [R, n, D] of tokens [R, n] at positions start[r] … of each canvas, whose keys and values are kept.

        They see the positions before them as the last call over those left them, as far as blocks allow. start [R] and
        n are multiples of `block_length`; what stands behind the last of them is forgotten.
        """
        rows, length = tokens.shape
        width = prefix.layers[0].key.shape[2]
        if tokens.device.type == "cpu":  # elsewhere it would have to wait for the device to know how much is needed
            width = int(start.max()) + length
        position = start[:, None] + torch.arange(length, device=tokens.device)  # [R, n]
        block = torch.arange(width, device=tokens.device) // self.block_length
        real = torch.arange(width, device=tokens.device) < (start + (tokens != self.pad_id).sum(1))[:, None]
        mask = real[:, None, None, :] & (block <= block[position][:, None, :, None])
        embedding, heads = self.embedding, self.config.heads
        places = embedding.positions[position.clamp(max=self.max_positions - 1)]
        x = embedding.dropout(embedding.tokens(tokens) * embedding.scale + places)
        index = position[:, None, :, None].expand(-1, heads, -1, self.config.width // heads)
        for layer, kept in zip(self.layers, prefix.layers, strict=True):
            y = layer.attention.input(layer.attention_residual.enter(x))
            query, key, value = y.view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            kept.key.scatter_(2, index, key)
            kept.value.scatter_(2, index, value)
            y = attend(query, kept.key[:, :, :width], kept.value[:, :, :width], mask)
            x = layer.attention_residual.leave(x, layer.attention.output(y.transpose(1, 2).reshape(x.shape)))
            y = layer.feed_forward(layer.feed_forward_residual.enter(x))
            x = layer.feed_forward_residual.leave(x, y)
        return self.norm(x)
