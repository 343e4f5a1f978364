"""row_stats in Triton: one program reads one row of logits once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # logits a step, 8 of each program's 256 threads; the columns that share a draw's random numbers
_NUM_WARPS = 8


@triton.jit
def _chunk_noise(seed, row, chunk):
    """A Gumbel and a uniform variable of a chunk of a row; reference.chunk_noise defines them."""
    b, c, d, _ = tl.philox(seed, chunk, chunk * 0, row.to(tl.int32), (row >> 32).to(tl.int32))
    b = b.to(tl.uint32, bitcast=True)
    fine = (b.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    coarse = ((b >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    gumbel = -tl.log(tl.where(b < 1048576, fine + fine * fine * 0.5, -tl.log(1.0 - coarse)))
    upper = c.to(tl.uint32, bitcast=True).to(tl.int64) << 21
    lower = (d.to(tl.uint32, bitcast=True) >> 11).to(tl.int64)
    return gumbel, ((upper | lower).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _load(logits, offset, mask):
    x = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), 3.4028234663852886e38)


@triton.jit
def _power(logits, column, columns, highest, scale):
    x = _load(logits, column, column < columns)
    return tl.where(x > float("-inf"), tl.exp((x - highest) * scale), 0.0).to(tl.float64)


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
    best,
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

    # Of the columns that a lane has seen; the powers are those of x - lane_highest.
    lane_highest = tl.full((BLOCK,), nothing, tl.float32)
    lane_second = tl.full((BLOCK,), nothing, tl.float32)
    lane_token = offset
    powers = tl.zeros((BLOCK,), tl.float32)  # sums of exp(x - highest)
    weighted = tl.zeros((BLOCK,), tl.float32)  # sums of (x - highest) exp(x - highest)
    if SAMPLE:
        scale = tl.load(temperature + n * temperature_step)
        sampling = scale > 0.0
        scale = tl.minimum(1.0 / tl.where(sampling, scale, 1.0), 3.4028234663852886e38)
        key = tl.load(seed)
        noise_row = row
        if HAS_NOISE_ROWS:
            noise_row = tl.load(noise_rows + n)
        drawn_chunk = tl.full((), -1, tl.int32)
        drawn_highest = tl.full((), 0.0, tl.float32)  # of the chunk drawn so far
        drawn_key = tl.full((), 0.0, tl.float32)  # its noisy log-sum-exp, from drawn_highest * scale
        uniform = tl.full((), 0.0, tl.float64)

    for first in range(0, width, BLOCK):
        column = first + offset
        x = _load(start, column, column < columns)
        # Of the old highest and x one is the new highest, and the power of the other is e. Below -87 powers count as
        # 1.6e-38, so that -inf needs no case of its own.
        above = tl.where(x > nothing, tl.minimum(tl.maximum(x - lane_highest, -87.0), 87.0), -87.0)
        e = tl.exp(-tl.abs(above))
        is_new = above > 0.0
        weighted = tl.where(is_new, e * (weighted - above * powers), weighted + above * e)
        powers = tl.where(is_new, e * powers + 1.0, powers + e)
        lane_token = tl.where(is_new, column, lane_token)
        lane_second = tl.maximum(lane_second, tl.minimum(lane_highest, x))
        lane_highest = tl.maximum(lane_highest, x)

        if SAMPLE:
            highest = tl.max(x, 0)
            power = tl.where(x > nothing, tl.exp((x - tl.where(highest > nothing, highest, 0.0)) * scale), 0.0)
            gumbel, chunk_uniform = _chunk_noise(key, noise_row, first // BLOCK)
            noisy = tl.log(tl.sum(power, 0)) + gumbel
            better = (highest > nothing) & ((drawn_chunk < 0) | ((highest - drawn_highest) * scale + noisy > drawn_key))
            drawn_chunk = tl.where(better, first, drawn_chunk)
            drawn_highest = tl.where(better, highest, drawn_highest)
            drawn_key = tl.where(better, noisy, drawn_key)
            uniform = tl.where(better, chunk_uniform, uniform)

    highest = tl.max(lane_highest, 0)
    possible = highest > nothing
    chosen = tl.min(tl.where(lane_highest == highest, lane_token, width), 0)
    second = tl.max(tl.where(lane_token == chosen, lane_second, lane_highest), 0)
    above = tl.where(lane_highest > nothing, tl.maximum(lane_highest - highest, -87.0), -87.0)
    e = tl.where(lane_highest > nothing, tl.exp(above), 0.0)
    sum_of_powers = tl.sum(e * powers, 0)
    sum_of_weighted = tl.sum(e * (weighted + above * powers), 0)
    log_sum = tl.log(sum_of_powers)
    chosen_log_prob = -log_sum
    if SAMPLE:
        tl.store(best + n, tl.where(possible, chosen, 0).to(tl.int64))
        if sampling & possible:
            # A few columns at a time: float64 sums of a whole chunk take too many registers.
            part: tl.constexpr = min(BLOCK, 256)
            total = tl.full((), 0.0, tl.float64)
            for first in range(0, BLOCK, part):
                column = drawn_chunk + first + tl.arange(0, part)
                total += tl.sum(_power(start, column, columns, drawn_highest, scale), 0)
            left = uniform * total
            drawn = width
            for first in range(0, BLOCK, part):
                column = drawn_chunk + first + tl.arange(0, part)
                power = _power(start, column, columns, drawn_highest, scale)
                passed = (tl.cumsum(power, 0) > left) & (power > 0.0)
                drawn = tl.minimum(drawn, tl.min(tl.where(passed, column, width), 0))
                left -= tl.sum(power, 0)
            chosen = tl.where(drawn < width, drawn, chosen)
            chosen_log_prob = _load(start, chosen, inside) - highest - log_sum
    tl.store(token + n, tl.where(possible, chosen, 0).to(tl.int64))
    tl.store(log_prob + n, tl.where(possible, chosen_log_prob, nothing))
    tl.store(margin + n, tl.where(possible, (1.0 - tl.exp(second - highest)) / sum_of_powers, 0.0))
    uncertainty = tl.maximum(log_sum - sum_of_weighted / sum_of_powers, 0.0)
    tl.store(entropy + n, tl.where(possible, uncertainty, 0.0))


def row_stats(
    logits: Tensor,  # [N, V]
    rows: Tensor | None,  # [M]
    temperature: Tensor | None,  # [1] or [M]
    seed: Tensor | None,  # [1]
    noise_rows: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logits.device.type == "cpu" and isinstance(_row_stats_kernel, triton.JITFunction):
        raise RuntimeError('impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1 set before Triton is imported')
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    count = logits.shape[0] if rows is None else rows.shape[0]
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    log_prob, margin, entropy = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(3))
    sampling = temperature is not None
    best = token.new_empty(count if sampling else 0)
    if count == 0:
        return token, log_prob, margin, entropy, best
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
            best,
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
    return token, log_prob, margin, entropy, best


def compile_cases() -> Iterator[tuple]:
    """What `.ci/compile_triton.py` compiles: (kernel, signature, constexprs, num_warps)."""
    outputs = {"token": "*i64", "log_prob": "*fp32", "margin": "*fp32", "entropy": "*fp32", "best": "*i64"}
    sizes = {"height": "i32", "width": "i32", "stride": "i64", "temperature_step": "i32"}
    for dtype in ("fp32", "bf16", "fp16"):
        for sampling in (False, True):
            pointers = {"logits": f"*{dtype}", "rows": "*i64", "temperature": "*fp32", "seed": "*i64"}
            pointers["noise_rows"] = "*i64"
            constants = {"HAS_ROWS": sampling, "HAS_NOISE_ROWS": sampling, "SAMPLE": sampling, "BLOCK": _BLOCK}
            yield _row_stats_kernel, {**pointers, **outputs, **sizes}, constants, _NUM_WARPS
