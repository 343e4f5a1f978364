"""Attention of one step of a beam in Triton: of the target's tokens, and of the source's.

The loop over positions is not split over programs. A step at base size and batch 1 has 32 of them (4 beams, 8 heads)
for 132 multiprocessors, and at 512 positions each makes 8 passes of its loop: a few microseconds of the step's hundred
launches. A split would take a second launch to put its parts together, and its rounding would depend on their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of the target's keys in a pass: 32 for each of a program's 128 threads
_POSITIONS = 32  # of the source in a pass
_QUERIES = 16  # beams of a program: the fewest rows of a matrix unit
_NUM_WARPS = 4


@triton.jit
def _target_kernel(
    query,  # [R, H, d]
    key,  # as query
    value,
    keys,  # [C, H, T, d]
    values,
    places,  # [R, T]
    position,  # [1]
    output,  # [R, H, d] contiguous
    width,  # d
    positions,  # T
    query_stride,
    query_head_stride,
    row_stride,
    head_stride,
    position_stride,
    places_stride,
    factor,  # of a dot product, that 2^x is its weight
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for a beam's head. What it stores no other program of this launch reads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    is_column = column < width
    at = row * query_stride + head * query_head_stride + column
    q = tl.load(query + at, mask=is_column, other=0.0).to(tl.float32) * factor
    own_key = tl.load(key + at, mask=is_column, other=0.0)
    own_value = tl.load(value + at, mask=is_column, other=0.0)
    keys += head * head_stride
    values += head * head_stride
    places += row * places_stride

    length = tl.load(position)
    into = row * row_stride + length.to(tl.int64) * position_stride + column
    # No room, no columns. (No mask of vector & scalar: the interpreter makes int32 of a splat int1.)
    is_stored = column < tl.where(length < positions, width, 0)
    tl.store(keys + into, own_key, mask=is_stored)
    tl.store(values + into, own_value, mask=is_stored)
    if head == 0:
        tl.store(places + length, row.to(tl.int32), mask=length < positions)
    length = tl.minimum(length, positions)

    # Of every BLOCK-th position: the highest score, and sums relative to it. The new token is in the first.
    lane = tl.arange(0, BLOCK)
    highest = tl.zeros((BLOCK,), tl.float32) + tl.sum(q * own_key.to(tl.float32), 0)
    total = tl.where(lane == 0, 1.0, 0.0)
    mean = total[:, None] * own_value.to(tl.float32)[None, :]
    for start in range(0, length, BLOCK):
        t = start + lane
        is_seen = t < length
        place = tl.load(places + t, mask=is_seen, other=0).to(tl.int64)
        lies = (place * row_stride + t.to(tl.int64) * position_stride)[:, None] + column[None, :]
        is_there = is_seen[:, None] & is_column[None, :]
        k = tl.load(keys + lies, mask=is_there, other=0.0).to(tl.float32)
        v = tl.load(values + lies, mask=is_there, other=0.0).to(tl.float32)
        score = tl.where(is_seen, tl.sum(k * q[None, :], 1), float("-inf"))
        before = highest
        highest = tl.maximum(highest, score)
        rescale = tl.exp2(before - highest)
        weight = tl.exp2(score - highest)
        total = total * rescale + weight
        mean = mean * rescale[:, None] + weight[:, None] * v

    rescale = tl.exp2(highest - tl.max(highest, 0))
    result = tl.sum(mean * rescale[:, None], 0) / tl.sum(total * rescale, 0)
    into = (row * tl.num_programs(1) + head) * width + column
    tl.store(output + into, result.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def _product(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which has no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _source_kernel(
    query,  # [B, K, H, d]
    keys,  # [C, H, S, d]
    values,
    sources,  # [B]
    lengths,  # [C]
    output,  # [B, K, H, d] contiguous
    beams,  # K
    width,  # d
    positions,  # S
    query_row_stride,
    query_stride,
    query_head_stride,
    row_stride,
    head_stride,
    position_stride,
    factor,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program for a sentence's head: its beams are rows of one matrix, and the keys are read once for all."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    beam = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    is_query = (beam < beams)[:, None] & (column < width)[None, :]
    at = row * query_row_stride + beam[:, None] * query_stride + head * query_head_stride + column[None, :]
    q = tl.load(query + at, mask=is_query, other=0.0)
    source = tl.load(sources + row).to(tl.int64)
    length = tl.minimum(tl.load(lengths + source), positions)
    keys += source * row_stride + head * head_stride
    values += source * row_stride + head * head_stride

    highest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        lies = t.to(tl.int64)[:, None] * position_stride + column[None, :]
        is_there = (t < length)[:, None] & (column < width)[None, :]
        k = tl.load(keys + lies, mask=is_there, other=0.0)
        v = tl.load(values + lies, mask=is_there, other=0.0)
        score = _product(q, tl.trans(k), INTERPRETED) * factor
        score = tl.where((t < length)[None, :], score, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        rescale = tl.exp2(before - highest)
        total = total * rescale + tl.sum(weight, 1)
        mean = mean * rescale[:, None] + _product(weight.to(v.dtype), v, INTERPRETED)

    into = ((row * beams + beam[:, None]) * tl.num_programs(1) + head) * width + column[None, :]
    tl.store(output + into, (mean / total[:, None]).to(output.dtype.element_ty), mask=is_query)


def target_attention(
    query: Tensor,  # [R, H, d]
    key: Tensor,
    value: Tensor,
    keys: Tensor,  # [C, H, T, d]
    values: Tensor,
    places: Tensor,  # [R, T] int32
    position: Tensor,  # [1] int32
) -> Tensor:
    if not query.stride() == key.stride() == value.stride():
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = query.new_empty(query.shape)
    rows, heads, width = query.shape
    if output.numel():
        columns = triton.next_power_of_2(width)
        with _device_of(query):
            _target_kernel[(rows, heads)](
                query,
                key,
                value,
                keys,
                values,
                places,
                position,
                output,
                width,
                keys.shape[2],
                *query.stride()[:2],
                *keys.stride()[:3],
                places.stride(0),
                math.log2(math.e) / math.sqrt(width),
                BLOCK=max(1, _ELEMENTS // columns),
                WIDTH=columns,
                num_warps=_NUM_WARPS,
            )
    return output


def source_attention(
    query: Tensor,  # [B, K, H, d]
    keys: Tensor,  # [C, H, S, d]
    values: Tensor,
    sources: Tensor,  # [B] int32
    lengths: Tensor,  # [C] int32
) -> Tensor:
    output = query.new_empty(query.shape)
    rows, beams, heads, width = query.shape
    if output.numel():
        with _device_of(query):
            _source_kernel[(rows, heads, triton.cdiv(beams, _QUERIES))](
                query,
                keys,
                values,
                sources,
                lengths,
                output,
                beams,
                width,
                keys.shape[2],
                *query.stride()[:3],
                *keys.stride()[:3],
                math.log2(math.e) / math.sqrt(width),
                QUERIES=_QUERIES,
                BLOCK=_POSITIONS,
                WIDTH=max(16, triton.next_power_of_2(width)),
                INTERPRETED=not query.is_cuda,
                num_warps=_NUM_WARPS,
            )
    return output


def _device_of(query: Tensor) -> contextlib.AbstractContextManager:
    if query.is_cuda:
        return torch.cuda.device(query.device)
    if isinstance(_target_kernel, triton.JITFunction):
        raise RuntimeError('impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1 set before Triton is imported')
    return contextlib.nullcontext()


def compile_cases() -> Iterator[tuple]:
    """What `.ci/compile_triton.py` compiles: (kernel, signature, constexprs, num_warps)."""
    strides = dict.fromkeys(
        ("query_stride", "query_head_stride", "row_stride", "head_stride", "position_stride"), "i32:16"
    )
    for dtype in ("fp32", "bf16", "fp16"):
        for width in (32, 64, 128):
            cache = dict.fromkeys(("query", "keys", "values", "output"), f"*{dtype}:16") | {"width": "i32:16"}
            cache |= {"positions": "i32", "factor": "fp32", **strides}
            target = {"key": f"*{dtype}:16", "value": f"*{dtype}:16", "places": "*i32:16", "position": "*i32:16"}
            sizes = {"BLOCK": _ELEMENTS // width, "WIDTH": width}
            yield _target_kernel, cache | target | {"places_stride": "i32"}, sizes, _NUM_WARPS
            source = {"sources": "*i32:16", "lengths": "*i32:16", "beams": "i32", "query_row_stride": "i32:16"}
            sizes = {"QUERIES": _QUERIES, "BLOCK": _POSITIONS, "WIDTH": width, "INTERPRETED": False}
            yield _source_kernel, cache | source, sizes, _NUM_WARPS
