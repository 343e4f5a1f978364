"""The specification of the refinement family: whole distributions in float64, sorts, one row at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entropies are added as integers in units of 2^-32 nats, each at most 64 nats, so that no order of adding matters.
ENTROPY_UNIT = 2.0**-32
LARGEST_ENTROPY = 64.0
# Columns that share the random numbers of a draw.
CHUNK = 2048


class RowStats(NamedTuple):
    """A token for each row of logits and what its distribution says about it; all of the leading shape."""

    token: Tensor  # int64
    log_prob: Tensor  # float32, natural logarithm, of `token`
    margin: Tensor  # float32, highest minus second-highest probability
    entropy: Tensor  # float32, in nats
    best: Tensor | None = None  # int64, the most probable token, which `token` is not where it was drawn


class Commit(NamedTuple):
    """The canvas [B, T] after some of its open positions were decided."""

    tokens: Tensor  # [B, T], dtype of the canvas
    committed: Tensor  # [B, T] bool, true where a token was written


def row_stats(
    logits: Tensor,  # [N, V]
    rows: Tensor | None,  # [M] int64
    temperature: Tensor | None,  # [1] or [N or M] float32
    seed: Tensor | None,  # [1] int64
    noise_rows: Tensor | None = None,  # [N or M] int64
) -> RowStats:
    row = torch.arange(logits.shape[0], device=logits.device) if rows is None else rows
    if rows is not None and ((rows < 0) | (rows >= logits.shape[0])).any():
        bad = rows[(rows < 0) | (rows >= logits.shape[0])][0]
        raise ValueError(f"rows must be in [0, {logits.shape[0]}); got {bad}")
    largest = torch.finfo(torch.float32).max
    x = logits[row].float().double().nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)
    possible = x.amax(-1) > -torch.inf

    log_p = x.log_softmax(-1).masked_fill(~possible[:, None], -torch.inf)
    p = log_p.exp()
    highest = p.sort(-1, descending=True).values
    margin = highest[:, 0] - (highest[:, 1] if p.shape[1] > 1 else 0.0)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)

    best = token = highest_column(x)
    if temperature is not None:
        if (temperature == torch.inf).any():
            raise ValueError("temperature must be finite; got inf")
        temperature = temperature.double().nan_to_num(nan=0.0).clamp(min=0.0).expand(len(row))
        drawn = draw(x, temperature, seed, row if noise_rows is None else noise_rows)
        token = torch.where((temperature > 0) & possible, drawn, best)
    log_prob = log_p.gather(1, token[:, None])[:, 0]
    return RowStats(token, log_prob.float(), margin.float(), entropy.float(), best)


def highest_column(x: Tensor) -> Tensor:
    return (x == x.amax(-1, keepdim=True)).int().argmax(-1)  # argmax of booleans gives the first


def draw(x: Tensor, temperature: Tensor, seed: Tensor, row: Tensor) -> Tensor:
    """A column of each row of x [M, V], drawn from softmax(x / temperature [M]).

    The highest of the logits of a chunk, with Gumbel noise on each, is distributed as the chunk's log-sum-exp with
    Gumbel noise, and which of them it is does not depend on how high it is. So one Gumbel variable -log(E) a chunk
    decides between chunks, by the smallest E / sum of powers, and one uniform variable within the chunk chosen.
    """
    above = x - x.amax(-1, keepdim=True)
    power = (above / temperature.clamp(min=1e-38)[:, None]).exp().nan_to_num(nan=0.0)  # NaN: a row of -inf alone
    width = min(CHUNK, x.shape[1])
    power = torch.nn.functional.pad(power, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    sums = power.sum(-1)  # [M, chunks]
    exponential, uniform = chunk_noise(seed, row, sums.shape[1])
    chunk = (exponential / sums).nan_to_num(nan=torch.inf).argmin(1)
    here = torch.arange(len(row), device=x.device)
    passed = power[here, chunk].cumsum(-1) > (uniform * sums)[here, chunk][:, None]
    return chunk * CHUNK + (passed & (power[here, chunk] > 0)).int().argmax(-1)


def remask(scores: Tensor, count: Tensor, maskable: Tensor) -> Tensor:
    return _lowest(_rank(_defined(scores, nan=-torch.inf)), count, maskable)


def commit(
    token: Tensor,  # [B, T] int64
    ranking: Tensor,  # [B, T]: higher is committed first, but for the entropy policy, where lower is
    canvas: Tensor,  # [B, T]
    maskable: Tensor,  # [B, T] bool
    minimum: Tensor | None,  # [B] int64; None: `least` for all
    bound: Tensor | None,  # [B]; None: `limit` for all
    active: Tensor | None,  # [B] bool
    least: int,
    limit: float,
    policy: int,  # 0: quota, 1: threshold or margin, 2: entropy
) -> Commit:
    entropy, batch = policy == 2, canvas.shape[0]
    minimum = torch.full((batch,), least, device=canvas.device) if minimum is None else minimum
    bound = torch.full((batch,), limit, dtype=torch.float32, device=canvas.device) if bound is None else bound
    sureness = _defined(-ranking if entropy else ranking, nan=-torch.inf)
    rank = _rank(-sureness)
    count = minimum
    if policy == 1:
        count = count.maximum(((sureness >= bound.double()[:, None]) & maskable).sum(1))
    elif entropy:
        units = (-sureness.clamp(-LARGEST_ENTROPY, 0.0) / ENTROPY_UNIT).round().long() * maskable
        order = rank.masked_fill(~maskable, rank.shape[1]).argsort(dim=1, stable=True)
        units, open_ = units.gather(1, order), maskable.gather(1, order)
        before = units.cumsum(1) - units
        fits = before.double() * ENTROPY_UNIT <= bound.double()[:, None]
        count = count.maximum((fits & open_).sum(1))
    if active is not None:
        count = count.masked_fill(~active, 0)
    committed = _lowest(rank, count, maskable)
    return Commit(torch.where(committed, token.to(canvas.dtype), canvas), committed)


def _defined(values: Tensor, *, nan: float) -> Tensor:
    return values.double().nan_to_num(nan=nan, posinf=torch.inf, neginf=-torch.inf)


def _rank(values: Tensor) -> Tensor:
    """The place of each value in its row, sorted ascending, ties by position."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)


def _lowest(rank: Tensor, count: Tensor, maskable: Tensor) -> Tensor:
    place = _rank(rank.masked_fill(~maskable, rank.shape[1]))
    return (place < count[:, None]) & maskable


def chunk_noise(seed: Tensor, row: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Exponential and uniform variables float64 [M, chunks], functions of (seed, row, chunk) alone.

    Of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with counter (chunk, row) and
    the seed as key. Where the first word b is below 2^20, the end that decides, w = (b + 1/2) 2^-32 keeps all its bits;
    elsewhere 23 bits are kept, so that 1 - w is exact in float32; the exponential variable is -log(1 - w). The uniform
    one takes the next 53 bits.
    """
    b, c, d, _ = philox(seed, torch.arange(chunks, device=row.device)[None, :].expand(len(row), -1), row[:, None])
    fine = (b.double() + 0.5) * 2.0**-32
    coarse = ((b >> 9).double() + 0.5) * 2.0**-23
    exponential = torch.where(b < 2**20, fine + fine * fine / 2, -torch.log1p(-coarse))
    return exponential, ((c << 21 | d >> 11).double() + 0.5) * 2.0**-53


def philox(seed: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words, as int64, of the counter (low's halves, high's halves) and the key `seed`."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(low & mask, (low >> 32) & mask, high & mask, (high >> 32) & mask)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two 32-bit numbers, in int64 that has no room for it."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & 0xFFFFFFFF
