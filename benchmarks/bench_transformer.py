"""Attention of a decoding step on a GPU, of a Transformer-base: beside torch's, in CUDA graphs as a decode runs it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from condgen_fast.decode.captured import Captured
from condgen_fast.ops.transformer import source_attention, target_attention

HEADS, WIDTH = 8, 64
LAYERS = 24  # calls in a graph, each with a cache of its own, so that launching does not show
SHAPES = [(1, 4, 32), (1, 4, 512), (8, 4, 32), (32, 4, 32), (32, 4, 512)]
CASES = pytest.mark.parametrize(("B", "K", "T"), SHAPES, ids=[f"B{B}-K{K}-T{T}" for B, K, T in SHAPES])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def graph(call, arguments):
    """`call` on each of the arguments, in one graph."""

    def all_of_them():
        for each in arguments:
            call(*each)

    captured = Captured(all_of_them, torch.device("cuda"))
    captured()
    captured()
    return captured


@CASES
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_target_attention(compare, device, B, K, T, dtype):
    if device == "cpu":
        pytest.skip("the CPU's kernels attend in transformer_step")
    rows, kind = B * K, {"dtype": DTYPES[dtype], "device": device}
    places = torch.arange(rows, dtype=torch.int32, device=device)[:, None].repeat(1, T)
    places[:, : T // 2] = torch.arange(B, dtype=torch.int32, device=device).repeat_interleave(K)[:, None] * K  # shared
    position = torch.tensor([T - 1], dtype=torch.int32, device=device)
    ours, torchs, caches = [], [], []
    mask = torch.zeros(B, 1, K, K, T, dtype=torch.bool, device=device)
    for k in range(K):
        mask[:, 0, k, 0, : T // 2], mask[:, 0, k, k, T // 2 :] = True, True
    mask = mask.flatten(3)
    for _ in range(LAYERS):
        query, key, value = torch.randn(3, rows, HEADS, WIDTH, **kind)
        cache = torch.randn(2, rows, HEADS, T, WIDTH, **kind)
        ours.append((query, key, value, *cache, places, position))
        caches.append((cache,))
        cache = cache.clone()
        cache[0, :, :, -1], cache[1, :, :, -1] = key, value
        shared = cache.view(2, B, K, HEADS, T, WIDTH).transpose(2, 3).flatten(3, 4)
        torchs.append((query.view(B, K, HEADS, WIDTH).transpose(1, 2), *shared, mask))
    found = target_attention(*ours[0]).view(B, K, HEADS, WIDTH).transpose(1, 2)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*torchs[0]), atol=2e-2, rtol=2e-2)
    compare(
        "target_attention",
        f"B{B} K{K} T{T} {dtype} x{LAYERS}",
        graph(target_attention, ours),
        peers={"SDPA over all beams' tokens": graph(F.scaled_dot_product_attention, torchs)},
        floor=("one read", graph(lambda cache: cache.amax(-1), caches)),
    )


@CASES
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_source_attention(compare, device, B, K, T, dtype):
    if device == "cpu":
        pytest.skip("the CPU's kernels attend in transformer_step")
    kind = {"dtype": DTYPES[dtype], "device": device}
    lengths = torch.full((B,), T, dtype=torch.int32, device=device)
    lengths[1:] -= 3
    mask = torch.arange(T, device=device) < lengths[:, None, None, None]
    sources = torch.arange(B, dtype=torch.int32, device=device)
    ours, torchs, memories = [], [], []
    for _ in range(LAYERS):
        query = torch.randn(B, K, HEADS, WIDTH, **kind)
        memory = torch.randn(B, T, 2, HEADS, WIDTH, **kind)
        keys, values = memory.permute(2, 0, 3, 1, 4)
        ours.append((query, keys, values, sources, lengths))
        torchs.append((query.transpose(1, 2), keys, values, mask))
        memories.append((memory,))
    found = source_attention(*ours[0]).transpose(1, 2)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*torchs[0]), atol=2e-2, rtol=2e-2)
    compare(
        "source_attention",
        f"B{B} K{K} S{T} {dtype} x{LAYERS}",
        graph(source_attention, ours),
        peers={"SDPA with a mask": graph(F.scaled_dot_product_attention, torchs)},
        floor=("one read", graph(lambda memory: memory.amax(-1), memories)),
    )
