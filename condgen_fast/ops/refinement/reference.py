"""The specification of the refinement family: whole distributions in float64, sorts, one row at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entropies are added as integers in units of 2^-32 nats, each at most 64 nats, so that no order of adding matters.
ENTROPY_UNIT = 2.0**-32
LARGEST_ENTROPY = 64.0


class RowStats(NamedTuple):
    """A token for each row of logits and what its distribution says about it; all of the leading shape."""

    token: Tensor  # int64
    log_prob: Tensor  # float32, natural logarithm, of `token`
    margin: Tensor  # float32, highest minus second-highest probability
    entropy: Tensor  # float32, in nats


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

    key = x
    if temperature is not None:
        noise = gumbel(seed, row if noise_rows is None else noise_rows, x.shape[1])
        key = x + temperature.double().nan_to_num(nan=0.0).clamp(min=0.0)[:, None] * noise
    token = (key == key.amax(-1, keepdim=True)).int().argmax(-1)  # argmax of booleans gives the first
    log_prob = log_p.gather(1, token[:, None])[:, 0]
    return RowStats(token, log_prob.float(), margin.float(), entropy.float())


def remask(scores: Tensor, count: Tensor, maskable: Tensor) -> Tensor:
    return _lowest(_rank(_defined(scores, nan=-torch.inf)), count, maskable)


def commit(
    token: Tensor,  # [B, T] int64
    ranking: Tensor,  # [B, T]: higher is committed first, but for the entropy policy, where lower is
    canvas: Tensor,  # [B, T]
    maskable: Tensor,  # [B, T] bool
    minimum: Tensor,  # [B] int64
    bound: Tensor | None,  # [B]
    active: Tensor | None,  # [B] bool
    entropy: bool,
) -> Commit:
    sureness = _defined(-ranking if entropy else ranking, nan=-torch.inf)
    rank = _rank(-sureness)
    count = minimum
    if bound is not None and not entropy:
        count = count.maximum(((sureness >= bound.double()[:, None]) & maskable).sum(1))
    elif bound is not None:
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


def gumbel(seed: Tensor, row: Tensor, width: int) -> Tensor:
    """Standard Gumbel noise float64 [M, width], a function of (seed, row, column) alone.

    Every column takes one 32-bit word b of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3") with counter (column // 4, row) and the seed as key. From b comes an exponential variate E = -log(1 - w),
    and the noise is -log(E). Where b is below 2^20, the end that decides between improbable tokens,
    w = (b + 1/2) 2^-32 keeps all its bits; elsewhere 23 bits are kept, so that 1 - w is exact in float32.
    """
    columns = torch.arange(width, device=row.device)
    words = torch.stack(philox(seed, (columns // 4)[None, :].expand(len(row), -1), row[:, None]), -1)
    b = words.gather(-1, (columns % 4)[None, :, None].expand(len(row), -1, 1))[..., 0]
    fine = (b.double() + 0.5) * 2.0**-32
    coarse = ((b >> 9).double() + 0.5) * 2.0**-23
    return -torch.where(b < 2**20, fine + fine * fine / 2, -torch.log(1 - coarse)).log()


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
