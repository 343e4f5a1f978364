"""The compiled forward pass of our models on the CPU: when it stands in for their modules, and its decoding state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from condgen_fast import _library
from condgen_fast.ops import transformer as ops

if TYPE_CHECKING:
    from condgen_fast.models.layers import Encoder, EncoderDecoder, Memory

POSITIONS = 16
"""Positions that a cache grows by: less would be allocated more often, more would lie unused."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stands_in(*modules: nn.Module) -> bool:
    """Whether what these modules compute is what the kernels do.

    It is where nothing is trained (no gradient recorded, no dropout), the weights are on the CPU in a type of the
    kernels, and no part has been replaced, parametrised or hooked.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not _library.load() or not hasattr(torch.ops.condgen_fast, "transformer_step"):
        return False
    parts = list(modules)
    while parts:  # nn.Module.modules() and parameters() take many times as long, more than a small decoder's pass
        part = parts.pop()
        if part.training or part._forward_hooks or part._forward_pre_hooks:
            return False
        if type(part) not in _TORCH and type(part).__module__ != "condgen_fast.models.layers":
            return False
        for child in part._modules.values():
            if child is not None:
                parts.append(child)
        for value in part._parameters.values():
            if value is not None and not fits(value):
                return False
    return True


_TORCH = frozenset((nn.Linear, nn.LayerNorm, nn.Embedding, nn.Identity, nn.ModuleList))


def fits(value: Tensor) -> bool:
    return value.dtype in _DTYPES and value.is_cpu and value.is_contiguous()


def encode(encoder: Encoder, source: Tensor, lengths: Tensor) -> Tensor:
    """States [B, S, D] of source [B, S] int64 with lengths [B], 0 beyond them."""
    weights, config = listed(encoder.embedding, encoder.layers, encoder.norm), encoder.config
    states = ops.transformer_pass(
        source, lengths.long(), [], lengths.long(), weights,
        heads=config.heads, norm_first=config.norm == "pre", gelu=config.activation == "gelu",
    )  # fmt: skip
    return states.to(encoder.embedding.tokens.weight.dtype)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) for x [..., inputs], in x's dtype."""
    y = ops.linear(x.float().reshape(-1, x.shape[-1]), layer.weight, _vector(layer.bias))
    return y.view(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class CompiledState:
    """Where a batch of beams stands. It is consumed by the step it is handed to, which writes into its cache."""

    memory: Memory
    beam_size: int
    lengths: Tensor  # [B] int64 of the sources
    cross: list[Tensor]  # per layer the source's keys and values, float32
    slots: Tensor  # [B * K, t] int32, the row of the cache where each earlier token of a beam lies
    cache: list[Tensor]  # [positions, layers, 2, rows, D] each
    weights: list[Tensor]

    @classmethod
    def start(cls, model: EncoderDecoder, memory: Memory, beam_size: int) -> CompiledState:
        decoder = model.decoder
        weights = [*listed(decoder.embedding, decoder.layers, decoder.norm), model.output_weight]
        lengths = memory.mask.sum(1)
        slots = torch.empty(len(lengths) * beam_size, 0, dtype=torch.int32)
        return cls(memory, beam_size, lengths, cross_of(memory), slots, [], weights)

    def step(self, model: EncoderDecoder, tokens: Tensor) -> tuple[Tensor, CompiledState]:
        config, cache = model.config, self.cache
        (rows, position), allocated = self.slots.shape, sum(len(part) for part in self.cache)
        if position == allocated or cache[-1].shape[3] < rows:
            if position < allocated:  # more beams than there were: the rest of the part is of no use
                cache = [*cache[:-1], cache[-1][: len(cache[-1]) - (allocated - position)]]
            size = (POSITIONS, config.decoder_layers, 2, rows, config.width)
            cache = [*(part for part in cache if len(part)), torch.empty(size)]
        logits = ops.transformer_step(
            tokens, self.slots, cache, self.cross, self.lengths, self.weights,
            heads=config.heads, norm_first=config.norm == "pre", gelu=config.activation == "gelu",
        )  # fmt: skip
        own = torch.arange(rows, dtype=torch.int32)[:, None]
        return logits, replace(self, slots=torch.cat([self.slots, own], 1), cache=cache)

    def reorder(self, parents: Tensor) -> CompiledState:
        """parents [B, K'] -> the state whose beam k continues beam parents[b, k]; the cache stays as it is."""
        first = torch.arange(parents.shape[0])[:, None] * self.beam_size
        slots = self.slots.index_select(0, (first + parents).reshape(-1))
        return replace(self, beam_size=parents.shape[1], slots=slots)

    def select(self, rows: Tensor) -> CompiledState:
        """rows [R] -> the state of those sentences; their tokens stay where they are in the cache."""
        memory = self.memory.select(rows)
        slots = self.slots.view(-1, self.beam_size, self.slots.shape[1]).index_select(0, rows).flatten(0, 1)
        return replace(self, memory=memory, lengths=self.lengths[rows], cross=cross_of(memory), slots=slots)


def cross_of(memory: Memory) -> list[Tensor]:
    return [tensor.float() for pair in memory.cross for tensor in pair]


def listed(embedding: nn.Module, layers: Iterable[nn.Module], norm: nn.Module) -> list[Tensor]:
    """A stack's tensors in the order of `ops/transformer`."""
    weights = [embedding.tokens.weight, embedding.positions.contiguous()]
    for layer in layers:
        parts = layer._modules  # a module's attributes are slow: for a small decoder together as long as its pass
        for name, first, second in _BLOCKS:
            if name not in parts:
                continue
            block = parts[name]._modules
            for part in (parts[f"{name}_residual"]._modules["norm"], block[first], block[second]):
                weight, bias = part._parameters["weight"], part._parameters["bias"]
                weights += (weight if weight.dim() == 2 else _vector(weight), _vector(bias))
    if isinstance(norm, nn.LayerNorm):
        weights += (_vector(norm.weight), _vector(norm.bias))
    return weights


_BLOCKS = (("attention", "input", "output"), ("cross_attention", "query", "output"), ("feed_forward", "inner", "outer"))


def _vector(value: Tensor) -> Tensor:
    return value if value.dtype is torch.float32 else value.float()
