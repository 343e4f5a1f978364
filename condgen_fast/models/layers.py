"""Transformer blocks shared by every reference model: attention, feed-forward, encoder and decoder stacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from condgen_fast._check import check_number, check_token_ids
from condgen_fast.models import compiled


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and special tokens of a reference model; `SIZES` names the four sizes of the literature."""

    vocab_size: int
    width: int = 512
    feed_forward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    dropout: float = 0.1
    # "pre" normalises the input of each block (trains without a long warm-up), "post" its output (Vaswani 2017).
    norm: str = "pre"
    activation: str = "relu"
    # Sinusoidal positions have no parameters; learned ones are what Mask-Predict and LevT were published with.
    positions: str = "sinusoidal"
    max_positions: int = 1024
    tie_embeddings: bool = True
    pad_id: int = 0
    unk_id: int = 1
    bos_id: int = 2
    eos_id: int = 3
    mask_id: int = 4

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "feed_forward",
            "encoder_layers",
            "decoder_layers",
            "heads",
            "max_positions",
        ):
            check_number(getattr(self, name), name, minimum=1, integer=True)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}; got {self.width}")
        for name, choices in (
            ("norm", ("pre", "post")),
            ("activation", ("relu", "gelu")),
            ("positions", ("sinusoidal", "learned")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")


SIZES = {
    "tiny": {"width": 256, "feed_forward": 1024, "encoder_layers": 3, "decoder_layers": 3, "heads": 4},
    "small": {"width": 512, "feed_forward": 1024, "encoder_layers": 3, "decoder_layers": 3, "heads": 8},
    "base": {"width": 512, "feed_forward": 2048, "encoder_layers": 6, "decoder_layers": 6, "heads": 8},
    "big": {"width": 1024, "feed_forward": 4096, "encoder_layers": 6, "decoder_layers": 6, "heads": 16},
}


class Embedding(nn.Module):
    """Token embeddings scaled by sqrt(width) plus positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        nn.init.normal_(self.tokens.weight, std=config.width**-0.5)
        with torch.no_grad():
            self.tokens.weight[config.pad_id].zero_()
        self.scale = math.sqrt(config.width)
        self.dropout = Dropout(config.dropout)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(config.max_positions, config.width) * 0.02)
        else:
            self.register_buffer("positions", sinusoids(config.max_positions, config.width), persistent=False)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """tokens [B, L] at positions start … start + L - 1 -> [B, L, D]."""
        end = start + tokens.shape[1]
        if end > self.positions.shape[0]:
            raise ValueError(
                f"tokens must fit the model's {self.positions.shape[0]} positions; got a sequence of {end} tokens"
            )
        return self.dropout(self.tokens(tokens) * self.scale + self.positions[start:end])

    def at(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens [R], all at `position` [1], which the host does not know and nobody checks -> [R, D]."""
        positions = self.positions.index_select(0, position)
        return self.dropout(torch.add(positions, self.tokens(tokens), alpha=self.scale))


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions [length, width] (Vaswani 2017, section 3.5), sines in the first half of the width."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


class Dropout(nn.Module):
    """Dropout whose mask on the CPU takes one random byte an element, so p is rounded to a multiple of 1/256 there.

    torch draws one 64-bit number per element from a serial generator on the CPU: a quarter of a small model's training.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1); got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = round(self.p * 256)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - dropped))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, [B, heads, L, D/heads] each."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # The fused CPU kernel is three times slower than plain matrix products on short bf16 sequences (torch 2.13).
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


class KeyValue(NamedTuple):
    """Keys and values of one attention, each [B, heads, L, D / heads]."""

    key: Tensor
    value: Tensor

    def select(self, rows: Tensor) -> KeyValue:
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.input = _linear(config.width, 3 * config.width)
        self.output = _linear(config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x [B, L, D], mask bool [B, 1, 1, L] (true: may be looked at) -> [B, L, D] and the keys and values seen."""
        batch, length, width = x.shape
        query, key, value = self.input(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
        y = attend(query, key, value, mask, causal)
        return self.output(y.transpose(1, 2).reshape(batch, length, width)), KeyValue(key, value)


class CrossAttention(nn.Module):
    """Attention to a memory whose keys and values are computed once per sentence."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.query = _linear(config.width, config.width)
        self.memory = _linear(config.width, 2 * config.width)
        self.output = _linear(config.width, config.width)

    def remember(self, states: Tensor) -> KeyValue:
        """states [B, S, D] -> keys and values of this layer."""
        batch, length, _ = states.shape
        linear = compiled.linear if compiled.stands_in(self.memory) else nn.Linear.__call__
        return KeyValue(*linear(self.memory, states).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4))

    def forward(self, x: Tensor, memory: KeyValue, mask: Tensor) -> Tensor:
        """x [B, L, D], mask bool [B, 1, 1, S] -> [B, L, D]; the L queries are positions, or the beams of a sentence."""
        batch, length, width = x.shape
        query = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)
        y = attend(query, memory.key, memory.value, mask)
        return self.output(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.inner = _linear(config.width, config.feed_forward)
        self.outer = _linear(config.feed_forward, config.width)
        self.activation = F.gelu if config.activation == "gelu" else F.relu
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(self.activation(self.inner(x))))


def without_hooks(model: nn.Module) -> bool:
    """Whether a CUDA graph can hold a pass of our models: no hook of the user's has to run at each of them."""
    return not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


class Residual(nn.Module):
    """LayerNorm and dropout round a block: before it ("pre") or after the sum ("post")."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.pre = config.norm == "pre"

    def enter(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.dropout(y)
        return x if self.pre else self.norm(x)


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention, self.attention_residual = SelfAttention(config), Residual(config)
        self.feed_forward, self.feed_forward_residual = FeedForward(config), Residual(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, _ = self.attention(self.attention_residual.enter(x), mask)
        x = self.attention_residual.leave(x, y)
        y = self.feed_forward(self.feed_forward_residual.enter(x))
        return self.feed_forward_residual.leave(x, y)


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention, self.attention_residual = SelfAttention(config), Residual(config)
        self.cross_attention, self.cross_attention_residual = CrossAttention(config), Residual(config)
        self.feed_forward, self.feed_forward_residual = FeedForward(config), Residual(config)

    def look(self, x: Tensor, memory: KeyValue, memory_mask: Tensor) -> Tensor:
        """What follows self-attention: cross-attention and feed-forward, x [B, L, D]."""
        y = self.cross_attention(self.cross_attention_residual.enter(x), memory, memory_mask)
        x = self.cross_attention_residual.leave(x, y)
        y = self.feed_forward(self.feed_forward_residual.enter(x))
        return self.feed_forward_residual.leave(x, y)

    def forward(self, x: Tensor, mask: Tensor | None, memory: KeyValue, memory_mask: Tensor, causal: bool) -> Tensor:
        y, _ = self.attention(self.attention_residual.enter(x), mask, causal)
        return self.look(self.attention_residual.leave(x, y), memory, memory_mask)

    def step(
        self, x: Tensor, mask: Tensor, past: KeyValue | None, memory: KeyValue, memory_mask: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One position of K beams, x [B, K, D], queries of one sentence; mask [B, 1, K, tokens]: what each may see."""
        y, past = self.attention(self.attention_residual.enter(x), mask, past=past)
        return self.look(self.attention_residual.leave(x, y), memory, memory_mask), past


@dataclass(frozen=True)
class Memory:
    """An encoded source: its states, which positions are real, and every decoder layer's cross-attention keys."""

    states: Tensor  # [B, S, D]
    mask: Tensor  # bool [B, S], true: a real token
    cross: list[KeyValue]  # per decoder layer

    @property
    def attention_mask(self) -> Tensor:
        return self.mask[:, None, None, :]

    def select(self, rows: Tensor) -> Memory:
        return Memory(
            self.states.index_select(0, rows), self.mask.index_select(0, rows), [kv.select(rows) for kv in self.cross]
        )


class Encoder(nn.Module):
    def __init__(self, config: TransformerConfig, embedding: Embedding):
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """source [B, S], source_lengths [B] -> states [B, S, D], meaningless beyond the mask bool [B, S]."""
        if source.shape[1] == 0:
            source = source.new_full((source.shape[0], 1), self.embedding.tokens.padding_idx)
        # An empty source still shows one (pad) position, so that attention has something to divide by.
        lengths = source_lengths.clamp(min=1)
        mask = torch.arange(source.shape[1], device=source.device) < lengths[:, None]
        if compiled.stands_in(self):
            return compiled.encode(self, source, lengths), mask
        x = self.embedding(source)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return self.norm(x), mask


class Decoder(nn.Module):
    def __init__(self, config: TransformerConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def remember(self, states: Tensor) -> list[KeyValue]:
        return [layer.cross_attention.remember(states) for layer in self.layers]

    def forward(
        self, tokens: Tensor, memory: Memory, mask: Tensor | None, causal: bool, depth: int | None = None
    ) -> Tensor:
        """tokens [B, L], mask bool [B, 1, 1, L] -> [B, L, D] after the first `depth` layers (all by default)."""
        x = self.embedding(tokens)
        for layer, cross in zip(self.layers[:depth], memory.cross, strict=False):
            x = layer(x, mask, cross, memory.attention_mask, causal)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """What every reference model has: special ids, an encoder, a decoder, one embedding and one output matrix."""

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        embedding = Embedding(config)
        self.encoder = Encoder(config, embedding)
        self.decoder = Decoder(config, embedding)
        self.output_weight = (
            embedding.tokens.weight
            if config.tie_embeddings
            else nn.Parameter(torch.randn(config.vocab_size, config.width) * config.width**-0.5)
        )
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.pad_id, self.unk_id, self.mask_id = config.pad_id, config.unk_id, config.mask_id
        self.bos_id, self.eos_id = config.bos_id, config.eos_id

    def encode(self, source: Tensor, source_lengths: Tensor) -> Memory:
        """source [B, S] int64, source_lengths [B] -> the memory that decoding reads, once per sentence."""
        check_token_ids(source, "source", shape="B S", vocab_size=self.vocab_size)
        states, mask = self.encoder(source, source_lengths)
        return Memory(states, mask, self.decoder.remember(states))

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return F.linear(hidden, self.output_weight)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
