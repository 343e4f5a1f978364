"""Passes of a decoder that looks both ways over a canvas: compiled on the CPU where nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condgen_fast import _library
from condgen_fast.models import compiled
from condgen_fast.models.layers import Decoder, EncoderDecoder, Memory
from condgen_fast.ops import transformer as ops


@dataclass(frozen=True)
class CanvasPass:
    """The layers of a decoder that a head reads, on a batch of sources whose cross-attention keys are computed."""

    decoder: Decoder
    depth: int | None  # the first so many layers; None: all
    source: Memory
    lengths: Tensor  # int64 [B], of the sources
    weights: list[Tensor] | None  # as the compiled pass takes them; None: the modules themselves run

    @classmethod
    def start(cls, decoder: Decoder, depth: int | None, source: Memory) -> CanvasPass:
        """`source` holds the cross-attention keys of `decoder`, of all its layers."""
        weights = None
        if compiled.stands_in(decoder):
            weights = compiled.listed(decoder.embedding, list(decoder.layers)[:depth], decoder.norm)
        return cls(decoder, depth, source, source.mask.sum(1), weights)

    def select(self, rows: Tensor) -> CanvasPass:
        return replace(self, source=self.source.select(rows), lengths=self.lengths.index_select(0, rows))

    def states(self, model: EncoderDecoder, tokens: Tensor) -> Tensor:
        """canvas [B, L] bos … eos, padded on the right -> [B, L, D], of no meaning on padding."""
        real = tokens != model.pad_id
        if self.weights is None or torch.is_grad_enabled():
            return self.decoder(tokens, self.source, real[:, None, None, :], causal=False, depth=self.depth)
        config, source = model.config, replace(self.source, cross=self.source.cross[: self.depth])
        states = ops.transformer_pass(
            tokens, real.sum(1), compiled.cross_of(source), self.lengths, self.weights,
            heads=config.heads, norm_first=config.norm == "pre", gelu=config.activation == "gelu",
        )  # fmt: skip
        return states.to(model.output_weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; on the CPU, where nothing is trained, by our kernel: there a row's bits do not depend on the others."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not compiled.fits(weight) or not _has_kernel():
        return F.linear(x, weight, bias)
    flat = x.float().reshape(-1, x.shape[-1])
    y = ops.linear(flat, weight, None if bias is None else bias.float())
    return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def head(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _has_kernel() -> bool:
    return _library.load() and hasattr(torch.ops.condgen_fast, "linear")
