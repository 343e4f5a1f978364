"""The forward pass of our Transformers in one call, for decoding on the CPU; `models/layers.py` is its specification.

Weights are used where they lie, float32, bfloat16 or float16; whatever they are, sums are float32. The bits of a
sentence's result are the same in any batch, order and padding and with any number of threads: each output is computed
by the same operations in the same order. The order of the sums is also that of every instruction set with a fused
multiply-add, though not attention's.

`weights` lists tensors of the module, vectors as float32, all contiguous:

    embedding [V, D]; positions [P, D]
    each layer:  self-attention   norm weight, norm bias, input weight [3 D, D], bias, output weight [D, D], bias
                 cross-attention  norm weight, norm bias, query weight [D, D], bias, output weight [D, D], bias
                 feed-forward     norm weight, norm bias, inner weight [F, D], bias, outer weight [D, F], bias
    where `norm_first`: norm weight, norm bias
    a step only: output weight [V, D]
"""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library


def transformer_step(
    tokens: Tensor,  # [B, K] int64
    slots: Tensor,  # [B * K, t] int32
    cache: list[Tensor],  # [positions, layers, 2, rows, D] float32 each
    cross: list[Tensor],  # per layer a key and a value [B, heads, S, D / heads] float32
    cross_lengths: Tensor,  # [B] int64
    weights: list[Tensor],
    *,
    heads: int,
    norm_first: bool,
    gelu: bool,
) -> Tensor:
    """Logits [B, K, V] float32 that follow the last tokens of K beams a sentence, each being number t of its beam.

    cache    keys and values of the earlier tokens, position after position through the parts of the list; the last part
             has a place for position t, into which this step's are written, for row b * K + k in row b * K + k
    slots    the row of the cache in which the token of each earlier position of a beam lies: beams that part or
             sentences that leave change this table, and nothing in the cache moves
    cross    the source's keys and values, once a sentence; `cross_lengths` of their positions are looked at

    Equivalent to `Embedding`, every layer's `DecoderLayer.step`, the norm and the projection of `models/layers.py`,
    where a beam's `past` is what `slots` finds in the cache; up to the order of sums (about 1e-6 of their size).

    Raises ValueError for tensors that do not fit each other.
    """
    return torch.ops.condgen_fast.transformer_step(
        tokens, slots, cache, cross, cross_lengths, weights, heads, norm_first, gelu
    )


def transformer_pass(
    tokens: Tensor,  # [B, L] int64
    lengths: Tensor,  # [B] int64
    cross: list[Tensor],  # as in a step, or none
    cross_lengths: Tensor,  # [B] int64
    weights: list[Tensor],  # without those of cross-attention where `cross` is empty
    *,
    heads: int,
    norm_first: bool,
    gelu: bool,
) -> Tensor:
    """States [B, L, D] float32 of a pass in which every token sees its whole sentence; 0 beyond `lengths`.

    Padding costs nothing: only the tokens of sentences are computed.

    Equivalent to `Encoder.forward` of `models/layers.py`, or with `cross` to its `Decoder.forward` with `causal=False`,
    on the tokens of sentences; up to the order of sums (about 1e-6 of their size).

    Raises ValueError for tensors that do not fit each other.
    """
    return torch.ops.condgen_fast.transformer_pass(
        tokens, lengths, cross, cross_lengths, weights, heads, norm_first, gelu
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, [N, outputs] float32, for x [N, inputs] float32, weight [outputs, inputs], bias [outputs].

    Equivalent to `torch.nn.functional.linear(x, weight, bias)`; a row's bits do not depend on the other rows.
    """
    return torch.ops.condgen_fast.linear(x, weight, bias)


@_library.register_fake("transformer_step")
def _(tokens, slots, cache, cross, cross_lengths, weights, heads, norm_first, gelu):
    return cache[0].new_empty(*tokens.shape, weights[-1].shape[0])


@_library.register_fake("transformer_pass")
def _(tokens, lengths, cross, cross_lengths, weights, heads, norm_first, gelu):
    return tokens.new_empty(*tokens.shape, weights[0].shape[1], dtype=torch.float32)


@_library.register_fake("linear")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])
