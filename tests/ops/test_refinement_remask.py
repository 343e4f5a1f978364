"""remask: which positions of a row become masks again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refinement_cases import DTYPES, INF, SELECTIONS, many, row_sets

from condgen_fast.ops.refinement import remask


def lowest(scores: list[float], count: int, maskable: list[bool]) -> list[bool]:
    places = [i for i, allowed in enumerate(maskable) if allowed]
    chosen = sorted(places, key=lambda i: (-INF if math.isnan(scores[i]) else scores[i], i))[: max(count, 0)]
    return [i in chosen for i in range(len(scores))]


@pytest.mark.parametrize("impl", SELECTIONS)
def test_the_worked_example(impl, device):
    """Mask-Predict's worked schedule: N = 12, T = 3."""
    scores = [
        [0.8, 0.3, 0.2, 0.3, 0.5, 0.5, 0.4, 0.1, 0.3, 0.6, 0.6, 0.9],
        [0.8, 0.5, 0.8, 0.8, 0.9, 0.7, 0.7, 0.6, 0.8, 0.6, 0.6, 0.9],
    ]
    count = torch.tensor([12 * 2 // 3, 12 * 1 // 3], device=device)
    masked = remask(
        torch.tensor(scores, device=device),
        count,
        maskable=torch.ones(2, 12, dtype=torch.bool, device=device),
        impl=impl,
    )
    places = [[i + 1 for i, flag in enumerate(row) if flag] for row in masked.tolist()]
    assert places == [[2, 3, 4, 5, 6, 7, 8, 9], [2, 8, 10, 11]]


@pytest.mark.parametrize("impl", SELECTIONS)
def test_exact_counts_of_every_schedule(impl, device):
    """All N <= 64, T <= 16, every round: the N * (T - t) // T lowest of the N tokens between bos and eos."""
    torch.manual_seed(7)
    cases = [(n, n * (total - t) // total) for total in range(1, 17) for t in range(total) for n in range(65)]
    length = torch.tensor([n for n, _ in cases], device=device)
    count = torch.tensor([count for _, count in cases], device=device)
    place = torch.arange(66, device=device)
    maskable = (place >= 1) & (place <= length[:, None])
    scores = (torch.rand(len(cases), 66, device=device) * 20).round().log()  # ties and -inf
    scores[:, 0] = -INF
    masked = remask(scores, count, maskable=maskable, impl=impl)
    assert torch.equal(masked.sum(1), count)
    assert not (masked & ~maskable).any()
    below = (scores[:, None, :] < scores[:, :, None]) & maskable[:, None, :]
    tied = (scores[:, None, :] == scores[:, :, None]) & maskable[:, None, :] & (place[None, :] < place[:, None])
    assert torch.equal(masked, ((below | tied).sum(2) < count[:, None]) & maskable)


@pytest.mark.parametrize("impl", SELECTIONS)
@many
@given(case=row_sets(), count=st.lists(st.integers(-2, 15), min_size=4, max_size=4))
def test_remask_of_any_rows(impl, case, count, device):
    batch, width, scores, maskable, _ = case
    got = remask(
        torch.tensor(scores, device=device).view(batch, width),
        torch.tensor(count[:batch], dtype=torch.int64, device=device),
        maskable=torch.tensor(maskable, dtype=torch.bool, device=device).view(batch, width),
        impl=impl,
    )
    assert got.tolist() == [lowest(*row) for row in zip(scores, count[:batch], maskable, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", SELECTIONS)
def test_remask_of_wide_strided_rows_full_of_ties(impl, dtype, device):
    torch.manual_seed(8)
    scores = torch.randint(0, 4, (3, 4001), device=device).to(dtype)[:, ::2]
    maskable = torch.rand(2001, 3, device=device).T < 0.8
    for count in ([1, 700, 1400], [2001, 5000, 0]):
        got = remask(scores, torch.tensor(count, device=device), maskable=maskable, impl=impl)
        want = [lowest(*row) for row in zip(scores.tolist(), count, maskable.tolist(), strict=True)]
        assert got.tolist() == want


@pytest.mark.parametrize("impl", SELECTIONS)
def test_remask_of_saturated_rows_never_touches_specials(impl, device):
    """fairseq's selection masks bos or padding where a token's log-probability is exactly 0."""
    scores = torch.zeros(2, 9, device=device)
    maskable = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]], device=device).bool()
    for count in range(7):
        masked = remask(scores, torch.full((2,), count, device=device), maskable=maskable, impl=impl)
        assert masked.sum(1).tolist() == [min(count, 4), min(count, 1)]
        assert masked[0].nonzero().flatten().tolist() == list(range(1, 1 + min(count, 4)))
