"""row_stats in Triton: one program reads one row of logits once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # logits a step, 8 of each program's 256 threads
_NUM_WARPS = 8


@triton.jit
def _gumbel(seed, row, first, BLOCK: tl.constexpr):
    """Noise of the columns first ... first + BLOCK of a row; reference.gumbel defines it."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(seed, quad, quad * 0, quad * 0 + row.to(tl.int32), quad * 0 + (row >> 32).to(tl.int32))
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.uint32, bitcast=True)
    fine = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    coarse = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(tl.where(word < 1048576, fine + fine * fine * 0.5, -tl.log(1.0 - coarse)))


@triton.jit
def _row_stats_kernel(
    # inputs
    logits,  # [N, V], rows `stride` apart
    rows,  # [M]
    temperature,  # [1] or [M]
    seed,  # [1]
    noise_rows,  # [M]
    # outputs, each [M]
    token,
    log_prob,
    margin,
    entropy,
    # sizes
    height,  # N
    width,  # V
    stride,
    temperature_step,
    HAS_ROWS: tl.constexpr,
    HAS_NOISE_ROWS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(rows + n)
    inside = (row >= 0) & (row < height)
    start = logits + row * stride
    # A row that is not there has no columns. (No mask of vector & scalar: the interpreter makes int32 of a splat int1.)
    columns = tl.where(inside, width, 0)
    offset = tl.arange(0, BLOCK)
    nothing = float("-inf")

    # of the columns a lane has seen
    lane_highest = tl.full((BLOCK,), nothing, tl.float32)
    lane_second = tl.full((BLOCK,), nothing, tl.float32)
    lane_token = offset
    powers = tl.zeros((BLOCK,), tl.float32)  # sums of exp(x - base)
    weighted = tl.zeros((BLOCK,), tl.float32)  # sums of (x - base) exp(x - base)
    base = tl.full((), 0.0, tl.float32)  # the highest logit so far, 0 while there is none
    any_yet = base > 0.0
    if SAMPLE:
        scale = tl.load(temperature + n * temperature_step)
        scale = tl.where(scale > 0.0, scale, 0.0)
        key = tl.load(seed)
        noise_row = row
        if HAS_NOISE_ROWS:
            noise_row = tl.load(noise_rows + n)
        lane_key = tl.full((BLOCK,), nothing, tl.float32)
        lane_sample = offset

    for first in range(0, width, BLOCK):
        column = first + offset
        x = tl.load(start + column, mask=column < columns, other=nothing).to(tl.float32)
        x = tl.minimum(tl.where(x == x, x, nothing), 3.4028234663852886e38)
        lane_token = tl.where(x > lane_highest, column, lane_token)
        lane_second = tl.maximum(lane_second, tl.minimum(lane_highest, x))
        lane_highest = tl.maximum(lane_highest, x)

        highest = tl.max(lane_highest, 0)
        new_base = tl.where(highest > nothing, highest, 0.0)
        shift = tl.where(any_yet, base - new_base, 0.0)
        factor = tl.exp(shift)
        # below -87 powers of a row's best are taken for 1.6e-38, so that -inf needs no case of its own
        exponent = tl.maximum(x - new_base, -87.0)
        power = tl.exp(exponent)
        weighted = factor * (weighted + shift * powers) + power * exponent
        powers = factor * powers + power
        base = new_base
        any_yet = highest > nothing

        if SAMPLE:
            noisy = tl.where(x > nothing, x + scale * _gumbel(key, noise_row, first, BLOCK), nothing)
            lane_sample = tl.where(noisy > lane_key, column, lane_sample)
            lane_key = tl.maximum(lane_key, noisy)

    highest = tl.max(lane_highest, 0)
    best = tl.min(tl.where(lane_highest == highest, lane_token, width), 0)
    second = tl.max(tl.where(lane_token == best, lane_second, lane_highest), 0)
    sum_of_powers = tl.sum(powers, 0)
    log_sum = tl.log(sum_of_powers)
    possible = highest > nothing
    chosen = best
    chosen_log_prob = -log_sum
    if SAMPLE:
        chosen = tl.min(tl.where(lane_key == tl.max(lane_key, 0), lane_sample, width), 0)
        x = tl.load(start + chosen, mask=inside, other=nothing).to(tl.float32)
        chosen_log_prob = tl.minimum(x, 3.4028234663852886e38) - highest - log_sum
    tl.store(token + n, tl.where(possible, chosen, 0).to(tl.int64))
    tl.store(log_prob + n, tl.where(possible, chosen_log_prob, nothing))
    tl.store(margin + n, tl.where(possible, (1.0 - tl.exp(second - highest)) / sum_of_powers, 0.0))
    uncertainty = tl.maximum(log_sum - tl.sum(weighted, 0) / sum_of_powers, 0.0)
    tl.store(entropy + n, tl.where(possible, uncertainty, 0.0))


def row_stats(
    logits: Tensor,  # [N, V]
    rows: Tensor | None,  # [M]
    temperature: Tensor | None,  # [1] or [M]
    seed: Tensor | None,  # [1]
    noise_rows: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.device.type == "cpu" and isinstance(_row_stats_kernel, triton.JITFunction):
        raise RuntimeError('impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1 set before Triton is imported')
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    count = logits.shape[0] if rows is None else rows.shape[0]
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    log_prob, margin, entropy = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(3))
    if count == 0:
        return token, log_prob, margin, entropy
    sampling = temperature is not None
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        _row_stats_kernel[(count,)](
            logits,
            rows if rows is not None else logits,
            temperature if sampling else logits,
            seed if sampling else logits,
            noise_rows if noise_rows is not None else logits,
            token,
            log_prob,
            margin,
            entropy,
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            int(sampling and temperature.shape[0] == count),
            HAS_ROWS=rows is not None,
            HAS_NOISE_ROWS=noise_rows is not None,
            SAMPLE=sampling,
            BLOCK=min(_BLOCK, max(16, triton.next_power_of_2(logits.shape[1]))),
            num_warps=_NUM_WARPS,
        )
    return token, log_prob, margin, entropy


def compile_cases() -> Iterator[tuple]:
    """What `.ci/compile_triton.py` compiles: (kernel, signature, constexprs, num_warps)."""
    outputs = {"token": "*i64", "log_prob": "*fp32", "margin": "*fp32", "entropy": "*fp32"}
    sizes = {"height": "i32", "width": "i32", "stride": "i64", "temperature_step": "i32"}
    for dtype in ("fp32", "bf16", "fp16"):
        for sampling in (False, True):
            pointers = {"logits": f"*{dtype}", "rows": "*i64", "temperature": "*fp32", "seed": "*i64"}
            pointers["noise_rows"] = "*i64"
            constants = {"HAS_ROWS": sampling, "HAS_NOISE_ROWS": sampling, "SAMPLE": sampling, "BLOCK": _BLOCK}
            yield _row_stats_kernel, {**pointers, **outputs, **sizes}, constants, _NUM_WARPS
