"""A decoding state whose steps are made in place, so that a CUDA graph can hold one of them and replay it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from condgen_fast._check import check_tensor
from condgen_fast.models.layers import (
    CrossAttention,
    Decoder,
    DecoderLayer,
    Embedding,
    Memory,
    SelfAttention,
    without_hooks,
)
from condgen_fast.ops.transformer import source_attention, target_attention

if TYPE_CHECKING:
    from condgen_fast.models.transformer import Transformer


@dataclass(frozen=True)
class ReservedState:
    """Where a batch of beams stands, in tensors that stay where they are. `step` and `reorder` change them in place.

    Keys and values of the target lie in the cache's row in which they were computed, and a table says where those of a
    beam lie: beams that part and join, or sentences that leave, change the table, and nothing in the cache moves. Keys
    and values of the source lie where `encode` put them.
    """

    memory: Memory  # of all sentences that there were
    lengths: Tensor  # int32 [sentences] of their sources
    cache: Tensor  # [layers, 2, rows, heads, steps, D / heads], rows: beams of all sentences that there were
    places: Tensor  # int32 [B, K, steps]: the row of the cache where each earlier token of a beam lies
    sources: Tensor  # int32 [B]: the row of `memory` of each sentence
    position: Tensor  # int32 [1]: of the next token

    @classmethod
    def start(cls, model: Transformer, memory: Memory, beam_size: int, steps: int) -> ReservedState:
        sentences, heads, _, width = memory.cross[0].key.shape
        shape = (len(memory.cross), 2, sentences * beam_size, heads, steps, width)
        integers = {"dtype": torch.int32, "device": memory.mask.device}
        return cls(
            memory,
            lengths=memory.mask.sum(1, dtype=torch.int32),
            cache=torch.empty(shape, dtype=memory.cross[0].key.dtype, device=memory.mask.device),
            places=torch.zeros(sentences, beam_size, steps, **integers),
            sources=torch.arange(sentences, **integers),
            position=torch.zeros(1, **integers),
        )

    def step(self, model: Transformer, tokens: Tensor) -> tuple[Tensor, ReservedState]:
        sizes = dict(zip("BK", self.places.shape[:2], strict=True))
        check_tensor(tokens, "tokens", shape="B K", sizes=sizes)
        decoder = model.decoder
        x = decoder.embedding.at(tokens.reshape(-1), self.position)
        for layer, cache, cross in zip(decoder.layers, self.cache, self.memory.cross, strict=True):
            heads, residual = layer.attention.heads, layer.attention_residual
            qkv = layer.attention.input(residual.enter(x)).view(x.shape[0], 3, heads, -1)
            y = target_attention(*qkv.unbind(1), *cache, self.places.flatten(0, 1), self.position)
            x = residual.leave(x, layer.attention.output(y.flatten(1)))

            residual = layer.cross_attention_residual
            query = layer.cross_attention.query(residual.enter(x)).view(*tokens.shape, heads, -1)
            y = source_attention(query, cross.key, cross.value, self.sources, self.lengths)
            x = residual.leave(x, layer.cross_attention.output(y.reshape(x.shape)))

            residual = layer.feed_forward_residual
            x = residual.leave(x, layer.feed_forward(residual.enter(x)))
        self.position.add_(1)
        return model.project(decoder.norm(x)).view(*tokens.shape, -1), self

    def reorder(self, parents: Tensor) -> ReservedState:
        """parents [B, K]; tokens behind the position are of no meaning, so the whole table is gathered."""
        sizes = dict(zip("BK", self.places.shape[:2], strict=True))
        check_tensor(parents, "parents", shape="B K", sizes=sizes)
        self.places.copy_(self.places.gather(1, parents[:, :, None].expand_as(self.places)))
        return self

    def select(self, rows: Tensor) -> ReservedState:
        """rows [R] -> the state of those sentences, which goes on in the same cache."""
        return replace(self, places=self.places.index_select(0, rows), sources=self.sources.index_select(0, rows))


def fits(decoder: nn.Module) -> bool:
    """Whether a step in place does all that the modules do: parts are ours, and no hook has to run at every step."""
    parts = [(decoder, Decoder), (decoder.embedding, Embedding)]
    for layer in decoder.layers:
        parts += [(layer, DecoderLayer)]
        parts += [(getattr(layer, "attention", None), SelfAttention)]
        parts += [(getattr(layer, "cross_attention", None), CrossAttention)]
    return without_hooks(decoder) and all(type(part) is kind for part, kind in parts)
