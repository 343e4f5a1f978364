"""row_stats: token, log-probability, margin and entropy, against definitions written out here."""

from __future__ import annotations

import math

import pytest
import torch
from refinement_cases import DTYPES, IMPLS, INF, NAN, generator
from torch import Tensor

from condgen_fast.ops.refinement import RowStats, row_stats


def expected(logits: Tensor) -> RowStats:
    """The docstring's "Equivalent to", in float64; for rows that have a distribution."""
    p = logits.double().softmax(-1)
    top = torch.cat([p, torch.zeros_like(p[..., :1])], -1).topk(2).values
    token = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    return RowStats(
        token, logits.double().log_softmax(-1).amax(-1), top[..., 0] - top[..., 1], torch.special.entr(p).sum(-1)
    )


def eager(logits: Tensor) -> RowStats:
    """The same in float32, as one would write it."""
    p = logits.float().softmax(-1)
    top = p.topk(2).values
    return RowStats(p.argmax(-1), top[..., 0].log(), top[..., 0] - top[..., 1], torch.special.entr(p).sum(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 2), (4, 255), (3, 2048), (2, 2049), (2, 6001)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_row_stats_is_the_definition(impl, shape, dtype, device):
    torch.manual_seed(0)
    logits = (torch.randn(shape, device=device) * 4).to(dtype)
    got, want = row_stats(logits, impl=impl), expected(logits.float())
    assert torch.equal(got.token, want.token)
    for name in ("log_prob", "margin", "entropy"):
        value = getattr(got, name)
        assert value.dtype == torch.float32 and value.shape == shape[:1]
        error = (value - getattr(want, name)).abs().max() if shape[0] else torch.tensor(0.0)
        plain = (getattr(eager(logits), name) - getattr(want, name)).abs().max() if shape[0] * shape[1] > 1 else 0.0
        assert error <= plain + 1e-6, (name, float(error), float(plain))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("offset", [-1e5, 0.0, 1e5])
@pytest.mark.parametrize("impl", IMPLS)
def test_row_stats_at_any_scale_and_offset(impl, offset, scale, device):
    torch.manual_seed(1)
    logits = torch.randn(4, 3000, device=device) * scale + offset
    got, want = row_stats(logits, impl=impl), expected(logits)
    assert torch.equal(got.token, want.token)
    for name in ("log_prob", "margin", "entropy"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=3e-6, atol=3e-6, msg=name)


@pytest.mark.parametrize("highest_at", [0, 1, 15, 16, 1023, 1024, 2047, 2048, 4999])
@pytest.mark.parametrize("impl", IMPLS)
def test_highest_and_second_are_found_anywhere(impl, highest_at, device):
    logits = torch.zeros(3, 5000, device=device)
    for row, second_at in enumerate([(highest_at + 1) % 5000, (highest_at + 1024) % 5000, (highest_at + 2500) % 5000]):
        logits[row, highest_at], logits[row, second_at] = 12.0, 11.0
    got, want = row_stats(logits, impl=impl), expected(logits)
    assert got.token.tolist() == [highest_at] * 3
    torch.testing.assert_close(got.margin.double(), want.margin, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_token_with_margin_0(impl, device):
    logits = torch.full((4, 4100), -3.0, device=device)
    logits[1, [7, 4000]] = 2.0
    logits[2, [2100, 30]] = 2.0
    logits[3, [0, 4099]] = 2.0
    logits[0, 5] = -INF
    got = row_stats(logits, impl=impl)
    assert got.token.tolist() == [0, 7, 30, 0]
    assert got.margin.tolist() == [0.0] * 4
    zeros = row_stats(torch.tensor([[-0.0, 0.0], [0.0, -0.0]], device=device), impl=impl)
    assert zeros.token.tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_infinities_and_nan(impl, temperature, device):
    rows = [
        ([-INF, -INF, -INF], (0, -INF, 0.0, 0.0)),  # no distribution
        ([NAN, -INF, NAN], (0, -INF, 0.0, 0.0)),
        ([-INF, 5.0, -INF], (1, 0.0, 1.0, 0.0)),  # one possibility
        ([NAN, -INF, 5.0], (2, 0.0, 1.0, 0.0)),
        ([0.0, INF, 1.0], (1, 0.0, 1.0, 0.0)),
        ([NAN, INF, -INF], (1, 0.0, 1.0, 0.0)),
        ([-3e38, 3e38, -INF], (1, 0.0, 1.0, 0.0)),
        ([1000.0, -1000.0, 0.0], (0, 0.0, 1.0, 0.0)),  # saturated
    ]
    logits = torch.tensor([row for row, _ in rows], device=device)
    got = row_stats(logits, temperature=temperature, generator=generator(device), impl=impl)
    for i, (_, want) in enumerate(rows):
        assert [float(value[i]) for value in got[:4]] == pytest.approx(list(want), rel=0, abs=1e-30), rows[i]
    two = row_stats(torch.tensor([[INF, 0.0, INF]], device=device), impl=impl)
    assert (int(two.token), float(two.margin)) == (0, 0.0)
    assert float(two.entropy) == pytest.approx(math.log(2)) and float(two.log_prob) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_far_apart_are_ties(impl, device):
    logits = torch.zeros(3, 7000, device=device)
    logits[0, [2049, 4097]] = INF
    logits[1, [5, 6999]] = torch.tensor([torch.finfo(torch.float32).max, INF], device=device)
    logits[2, [2, 3000, 6500]] = INF
    got = row_stats(logits, temperature=0.5, generator=generator(device), impl=impl)
    assert got.best.tolist() == [2049, 5, 2] and got.margin.tolist() == [0.0] * 3
    assert row_stats(logits, impl=impl).token.tolist() == [2049, 5, 2]


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_strides_and_rows(impl, device):
    torch.manual_seed(2)
    wide = torch.randn(3, 4, 80, device=device)
    for logits in (wide, wide[..., :71], wide[:, ::2, 5:], wide.transpose(0, 1), wide.transpose(1, 2), wide[0, 0]):
        got, want = row_stats(logits, impl=impl), row_stats(logits.contiguous(), impl="reference")
        assert got.token.shape == logits.shape[:-1]
        assert torch.equal(got.token, want.token)
        torch.testing.assert_close(got.entropy, want.entropy)

    for temperature in (0.0, 2.0):
        all_rows = row_stats(wide, temperature=temperature, generator=generator(device), impl=impl)
        index = torch.tensor([7, 0, 11, 7], device=device)
        some = row_stats(wide, rows=index, temperature=temperature, generator=generator(device), impl=impl)
        for whole, part in zip(all_rows, some, strict=True):
            assert torch.equal(part, whole.flatten()[index])
    assert row_stats(wide, rows=index[:0], impl=impl).token.shape == (0,)
    if device == "cpu" and impl != "triton":
        for bad in (-1, 12):
            with pytest.raises(ValueError, match=rf"rows must be in \[0, 12\); got {bad}"):
                row_stats(wide, rows=torch.tensor([3, bad]), impl=impl)
