"""commit: which tokens of a canvas are decided."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refinement_cases import INF, SELECTIONS, many, row_sets
from torch import Tensor

from condgen_fast.ops.refinement import RowStats, commit, row_stats


def committed_by_hand(policy, values, maskable, quota, threshold, minimum, active) -> list[bool]:
    """One row; values are log_prob, margin or entropy, whichever the policy ranks by."""
    if not active:
        return [False] * len(values)
    worst = INF if policy == "entropy" else -INF
    values = [worst if math.isnan(value) else value for value in values]
    places = [i for i, allowed in enumerate(maskable) if allowed]
    order = sorted(places, key=lambda i: (values[i] if policy == "entropy" else -values[i], i))
    if policy == "quota":
        count = quota
    elif policy == "entropy":
        units = [round(min(max(values[i], 0.0), 64.0) * 2**32) for i in order]
        count = sum(sum(units[:k]) <= threshold * 2**32 for k in range(len(units)))
    else:
        bound = float(torch.tensor(threshold).double().log().float()) if policy == "threshold" else threshold
        count = sum(values[i] >= bound for i in order)
    if policy != "quota":
        count = max(count, minimum)
    return [i in order[: max(count, 0)] for i in range(len(values))]


def stats_of(ranking: Tensor, token: Tensor) -> RowStats:
    return RowStats(token, ranking, ranking, ranking)


@pytest.mark.parametrize("policy", ["quota", "threshold", "margin", "entropy"])
@pytest.mark.parametrize("impl", SELECTIONS)
@many
@given(
    case=row_sets(),
    quota=st.lists(st.integers(-2, 14), min_size=4, max_size=4),
    threshold=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 1.5]), min_size=4, max_size=4),
    minimum=st.lists(st.integers(-1, 14), min_size=4, max_size=4),
    active=st.lists(st.booleans(), min_size=4, max_size=4),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_commit_of_any_rows(impl, policy, case, quota, threshold, minimum, active, id_dtype, device):
    batch, width, ranking, maskable, seed = case
    source = torch.Generator().manual_seed(seed)
    token = torch.randint(100, 200, (batch, width), generator=source).to(device)
    canvas = torch.randint(0, 100, (batch, width), generator=source).to(device, id_dtype)
    before = canvas.clone()
    limits = {
        "quota": {"quota": torch.tensor(quota[:batch], dtype=torch.int64, device=device)},
    }.get(policy) or {
        "threshold": torch.tensor(threshold[:batch], dtype=torch.float32, device=device),
        "minimum": torch.tensor(minimum[:batch], dtype=torch.int64, device=device),
    }
    got = commit(
        stats_of(torch.tensor(ranking, device=device).view(batch, width), token),
        canvas,
        maskable=torch.tensor(maskable, dtype=torch.bool, device=device).view(batch, width),
        policy=policy,
        active=torch.tensor(active[:batch], dtype=torch.bool, device=device),
        impl=impl,
        **limits,
    )
    rows = zip(ranking, maskable, quota, threshold, minimum, active, strict=False)
    assert got.committed.tolist() == [committed_by_hand(policy, *row) for row in rows]
    assert torch.equal(canvas, before) and got.tokens.dtype == id_dtype
    assert torch.equal(got.tokens, torch.where(got.committed, token.to(id_dtype), canvas))


@pytest.mark.parametrize("impl", SELECTIONS)
def test_each_policy_reads_its_own_statistic(impl, device):
    probability = torch.tensor([[0.9, 0.5, 0.95, 0.2, 0.6]], device=device)
    margin = torch.tensor([[0.1, 0.8, 0.2, 0.7, 0.3]], device=device)
    entropy = torch.tensor([[0.3, 0.2, 0.1, 0.4, 2.0]], device=device)
    stats = RowStats(torch.arange(5, device=device)[None] + 10, probability.log(), margin, entropy)
    canvas = torch.full((1, 5), 3, device=device)
    maskable = torch.tensor([[True, True, False, True, True]], device=device)

    def positions(**options):
        got = commit(stats, canvas, maskable=maskable, impl=impl, **options)
        assert got.tokens[0].tolist() == [10 + i if flag else 3 for i, flag in enumerate(got.committed[0].tolist())]
        return got.committed[0].nonzero().flatten().tolist()

    assert positions(policy="quota", quota=2) == [0, 4]
    assert positions(policy="quota", quota=0) == []
    assert positions(policy="threshold", threshold=0.55) == [0, 4]
    assert positions(policy="threshold", threshold=0.99) == [0]
    assert positions(policy="threshold", threshold=0.99, minimum=0) == []
    assert positions(policy="threshold", threshold=0.99, minimum=3) == [0, 1, 4]
    assert positions(policy="margin", threshold=0.7) == [1, 3]
    # ascending 0.2 0.3 0.4 2.0; before each 0, 0.2, 0.5, 0.9
    assert positions(policy="entropy", threshold=0.0) == [1]
    assert positions(policy="entropy", threshold=0.25) == [0, 1]
    assert positions(policy="entropy", threshold=0.6) == [0, 1, 3]
    assert positions(policy="entropy", threshold=1.0) == [0, 1, 3, 4]


@pytest.mark.parametrize("impl", SELECTIONS)
def test_the_entropy_bound_is_the_paper_s(impl, device):
    """EB-Sampler: sum of the committed entropies minus the largest of them is within the bound, and no further."""
    torch.manual_seed(9)
    entropy = torch.rand(50, 40, device=device)
    everywhere = torch.ones_like(entropy, dtype=torch.bool)
    bound = torch.rand(50, device=device) * 5
    stats = stats_of(entropy, torch.zeros(50, 40, dtype=torch.int64, device=device))
    got = commit(stats, stats.token, maskable=everywhere, policy="entropy", threshold=bound, impl=impl).committed
    for row, chosen, limit in zip(entropy.double(), got, bound, strict=True):
        inside = row[chosen]
        assert inside.sum() - inside.max() <= limit + 1e-6
        rest = row[~chosen]
        assert len(rest) == 0 or (inside.max() <= rest.min() and inside.sum() > limit - 1e-6)


@pytest.mark.parametrize("impl", SELECTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "quota", "quota": 3},
        {"policy": "threshold", "threshold": 1.0},
        {"policy": "margin", "threshold": 1.0},
        {"policy": "entropy", "threshold": 0.0},
    ],
    ids=lambda options: options["policy"],
)
def test_a_loop_of_commits_ends_with_no_mask_left(impl, options, device):
    torch.manual_seed(10)
    mask, prompt = 7, torch.arange(20, device=device) < torch.tensor([[0], [5], [20]], device=device)
    canvas = torch.where(prompt, 1, mask).expand(3, 20)
    given_tokens = canvas.clone()
    for _ in range(20):
        stats = row_stats(torch.randn(3, 20, 7, device=device), impl=impl)
        canvas = commit(stats, canvas, maskable=(canvas == mask) & ~prompt, impl=impl, **options).tokens
    assert not (canvas == mask).any()
    assert torch.equal(canvas[prompt], given_tokens[prompt])
