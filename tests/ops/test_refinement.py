"""row_stats, remask and commit: every implementation against definitions written out here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from condgen_fast import _library
from condgen_fast.ops.refinement import RowStats, commit, remask, row_stats
from condgen_fast.ops.refinement.reference import gumbel, philox

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

needs_library = pytest.mark.skipif(not _library.load(), reason="the compiled library is not built")
SELECTIONS = [pytest.param("auto", marks=needs_library), "reference"]
IMPLS = [*SELECTIONS, "triton"]


def generator(device: str, seed: int = 1) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# --- row_stats --------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 2), (4, 255), (3, 2048), (2, 2049), (2, 5001)], ids=str)
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
        assert [float(value[i]) for value in got] == pytest.approx(list(want), rel=0, abs=1e-30), rows[i]
    two = row_stats(torch.tensor([[INF, 0.0, INF]], device=device), impl=impl)
    assert (int(two.token), float(two.margin)) == (0, 0.0)
    assert float(two.entropy) == pytest.approx(math.log(2)) and float(two.log_prob) == pytest.approx(-math.log(2))


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


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_rows_stand_for_the_rows_in_the_noise(impl, device):
    logits = torch.randn(3, 4, 80, device=device, generator=generator(device))

    def draw(logits, **options):
        return row_stats(logits, temperature=2.0, generator=generator(device), impl=impl, **options).token

    plain = draw(logits)
    order = torch.tensor([7, 0, 11, 7], device=device)
    assert torch.equal(draw(logits, noise_rows=torch.arange(12, device=device).view(3, 4)), plain)
    assert torch.equal(draw(logits.flatten(0, 1)[order], noise_rows=order), plain.flatten()[order])
    assert torch.equal(draw(logits, rows=order, noise_rows=order), plain.flatten()[order])
    far = torch.tensor([2**63 - 1, -1, -(2**62), 5], device=device)
    want = row_stats(
        logits[0], temperature=2.0, generator=generator(device), noise_rows=far, impl="reference"
    ).token  # fmt: skip
    assert torch.equal(draw(logits[0], noise_rows=far), want)
    assert not torch.equal(draw(logits, noise_rows=torch.arange(12, device=device).view(3, 4) + 12), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", [pytest.param("auto", marks=needs_library), "triton"])
def test_all_implementations_draw_the_same(impl, dtype, device):
    torch.manual_seed(3)
    logits = (torch.randn(40, 2500, device=device) * 3).to(dtype)
    logits[:, ::7] = -INF
    for temperature in (1e-30, 0.5, 1.0, 3.0, 1e30):
        got = row_stats(logits, temperature=temperature, generator=generator(device, 9), impl=impl)
        want = row_stats(logits, temperature=temperature, generator=generator(device, 9), impl="reference")
        assert torch.equal(got.token, want.token)
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_prob_is_that_of_the_drawn_token_at_temperature_1(impl, device):
    torch.manual_seed(4)
    logits = torch.randn(30, 50, device=device)
    got = row_stats(logits, temperature=5.0, generator=generator(device), impl=impl)
    assert (got.token != logits.argmax(-1)).any()
    want = logits.log_softmax(-1).gather(1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.log_prob, want, rtol=1e-5, atol=1e-6)
    plain = row_stats(logits, impl=impl)
    assert torch.equal(got.margin, plain.margin) and torch.equal(got.entropy, plain.entropy)


@pytest.mark.parametrize("impl", IMPLS)
def test_temperature_of_each_row(impl, device):
    torch.manual_seed(5)
    logits = torch.randn(2, 20, 30, device=device)
    temperature = torch.tensor([0.0, 4.0, -1.0, NAN], device=device).repeat(10).view(2, 20)
    got = row_stats(logits, temperature=temperature, generator=generator(device), impl=impl).token
    greedy = row_stats(logits, impl=impl).token
    hot = row_stats(logits, temperature=4.0, generator=generator(device), impl=impl).token
    assert torch.equal(got, torch.where(temperature > 0, hot, greedy))
    assert not torch.equal(hot, greedy)


def test_the_seed_comes_from_the_generator(device):
    logits = torch.zeros(8, 1000, device=device)

    def draw(source=None):
        return row_stats(logits, temperature=1.0, generator=source, impl="reference").token.tolist()

    source = generator(device)
    first, second = draw(source), draw(source)
    assert first != second
    source = generator(device)
    assert [draw(source), draw(source)] == [first, second]
    torch.manual_seed(6)
    default = draw()
    torch.manual_seed(6)
    assert draw() == default
    assert len(set(first)) > 4  # rows draw apart


# 1 in a million true samplers fails one of these.
def assert_drawn_from(tokens: Tensor, p: Tensor) -> None:
    counts = torch.bincount(tokens.cpu(), minlength=len(p)).double()
    want = p.double().cpu() * len(tokens)
    statistic = float(((counts - want) ** 2 / want).sum())
    degrees = len(p) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile, z of 1e-6
    limit = degrees * (1 - 2 / (9 * degrees) + 4.7534 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, (statistic, limit, counts)


@pytest.mark.parametrize("impl", SELECTIONS)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_draws_follow_the_softmax(impl, temperature, device):
    logits = torch.tensor([1.0, -1.0, 0.0, 2.0, -INF, 0.5, 0.5, -3.0, 1.7], device=device)
    tokens = row_stats(logits.repeat(60_000, 1), temperature=temperature, generator=generator(device), impl=impl).token
    possible = logits > -INF
    assert possible[tokens].all()
    renumbered = (possible.cumsum(0) - 1)[tokens]
    assert_drawn_from(renumbered, (logits[possible] / temperature).softmax(0))


@needs_library
def test_draws_are_uniform_over_a_wide_row(device):
    wide = torch.zeros(1, 3000, device=device).expand(30_000, 3000)
    tokens = row_stats(wide, temperature=1.0, generator=generator(device)).token
    assert_drawn_from(tokens // 60, torch.full((50,), 0.02))
    assert_drawn_from(tokens % 60, torch.full((60,), 1 / 60))


def test_noise_is_gumbel_far_into_the_tail(device):
    noise = gumbel(torch.tensor([12345], device=device), torch.arange(100, device=device), 20_000)
    assert float(noise.mean()) == pytest.approx(0.57722, abs=5e-3)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=1e-2)
    for least in (5.0, 8.0, 11.0, 13.0):
        want = -math.expm1(-math.exp(-least)) * noise.numel()
        assert abs(int((noise > least).sum()) - want) < 5 * math.sqrt(want), least


def test_philox_known_answers():
    """kat_vectors of Random123 1.09, philox4x32 with 10 rounds."""

    def signed(upper: int, lower: int) -> Tensor:
        value = upper << 32 | lower
        return torch.tensor([value - (value >> 63 << 64)])

    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for (c0, c1, c2, c3), (k0, k1), want in cases:
        got = philox(signed(k1, k0), signed(c1, c0), signed(c3, c2))
        assert tuple(int(word) for word in got) == want


# --- remask -----------------------------------------------------------------------------------------------------------


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


FLOATS = st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 0.25, 0.5, 1.0, INF, NAN]) | st.floats(width=32)


@st.composite
def row_sets(draw):
    batch, width = draw(st.integers(0, 4)), draw(st.integers(0, 12))

    def table(element):
        return draw(st.lists(st.lists(element, min_size=width, max_size=width), min_size=batch, max_size=batch))

    return batch, width, table(FLOATS), table(st.booleans()), draw(st.integers(0, 2**32))


many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


# --- commit -----------------------------------------------------------------------------------------------------------


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


# --- What all of them share -------------------------------------------------------------------------------------------


@needs_library
def test_operators_pass_opcheck(device):
    torch.manual_seed(11)
    ops = torch.ops.condgen_fast
    logits = torch.randn(4, 30, device=device)
    seed, temperature = torch.tensor([5], device=device), torch.rand(4, device=device)
    if device == "cpu":
        torch.library.opcheck(ops.row_stats.default, (logits, None, None, None))
        torch.library.opcheck(ops.row_stats.default, (logits, torch.tensor([3, 1, 0, 0]), temperature, seed))
    maskable = torch.rand(3, 7, device=device) < 0.7
    scores, count = torch.randn(3, 7, device=device), torch.tensor([1, 2, 3], device=device)
    torch.library.opcheck(ops.remask.default, (scores, count, maskable))
    token = torch.randint(0, 9, (3, 7), device=device)
    rest = (torch.rand(3, device=device), torch.ones(3, dtype=torch.bool, device=device), True)
    torch.library.opcheck(ops.commit.default, (token, scores, token.int(), maskable, count, *rest))
    torch.library.opcheck(ops.commit.default, (token, scores, token, maskable, count, None, None, False))


@needs_library
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiles_in_one_graph(temperature, device):
    def step(logits, canvas, temperature):
        maskable = canvas == 7
        stats = row_stats(logits, temperature=temperature)
        decided = commit(stats, canvas, maskable=maskable, policy="threshold", threshold=0.5)
        again = remask(stats.log_prob, decided.committed.sum(1) // 2, maskable=decided.committed)
        return stats.log_prob, decided.tokens.masked_fill(again, 7)

    torch.manual_seed(12)
    logits = torch.randn(3, 6, 20, device=device) * 3
    canvas = torch.full((3, 6), 7, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.manual_seed(13)
    want = step(logits, canvas, temperature)
    torch.manual_seed(13)
    for got, value in zip(compiled(logits, canvas, temperature), want, strict=True):
        torch.testing.assert_close(got, value)


def test_bad_arguments_are_named(device):
    logits = torch.zeros(2, 3, 5, device=device)
    stats = row_stats(logits, impl="reference")
    scores, maskable = torch.zeros(2, 3, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    count, canvas = torch.ones(2, dtype=torch.int64, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)

    def committing(**options):
        return lambda: commit(**({"stats": stats, "canvas": canvas, "maskable": maskable, "policy": "quota"} | options))

    cases = [
        (lambda: row_stats([1.0]), TypeError, "logits must be a Tensor; got list"),
        (
            lambda: row_stats(logits.int()),
            ValueError,
            "logits must be float32, bfloat16, float16 or float64; got int32",
        ),
        (lambda: row_stats(logits[..., :0]), ValueError, "logits must have V at least 1; got 0"),
        (
            lambda: row_stats(logits, impl="cuda"),
            ValueError,
            "impl must be 'auto', 'reference' or 'triton'; got 'cuda'",
        ),
        (lambda: row_stats(logits, temperature=-1.0), ValueError, r"temperature must be in \[0.0, .*\]; got -1.0"),
        (lambda: row_stats(logits, temperature=INF), ValueError, "temperature must be in"),
        (lambda: row_stats(logits, temperature="1"), TypeError, "temperature must be a number; got str"),
        (
            lambda: row_stats(logits, temperature=scores[0]),
            ValueError,
            r"temperature must have shape \[2, 3\]; got \[3\]",
        ),
        (
            lambda: row_stats(logits, temperature=1.0, generator=3),
            TypeError,
            "generator must be a torch.Generator; got int",
        ),
        (lambda: row_stats(logits, rows=scores[0]), ValueError, "rows must be int64; got float32"),
        (
            lambda: row_stats(logits, temperature=1.0, noise_rows=count),
            ValueError,
            r"noise_rows must have shape \[2, 3\]; got",
        ),
        (lambda: remask(scores, count, maskable=maskable[0]), ValueError, r"maskable must have shape \[B, T\]"),
        (lambda: remask(scores, count[:1], maskable=maskable), ValueError, r"count must have shape \[B\].*; got \[1\]"),
        (lambda: remask(scores, count.float(), maskable=maskable), ValueError, "count must be int64; got float32"),
        (lambda: remask(canvas, count, maskable=maskable), ValueError, "scores must be float32"),
        (
            lambda: remask(scores, count, maskable=maskable, impl="triton"),
            ValueError,
            "impl must be 'auto' or 'reference'",
        ),
        (committing(), ValueError, "quota must be given for policy 'quota'; got None"),
        (committing(quota=1, threshold=0.5), ValueError, "threshold must be None for policy 'quota'"),
        (committing(policy="margin"), ValueError, "threshold must be given for policy 'margin'; got None"),
        (committing(policy="entropy", threshold=0.1, quota=1), ValueError, "quota must be None for policy 'entropy'"),
        (
            committing(policy="best"),
            ValueError,
            "policy must be 'quota', 'threshold', 'entropy' or 'margin'; got 'best'",
        ),
        (committing(quota=1.5), TypeError, "quota must be an int; got float"),
        (committing(quota=count[:1]), ValueError, r"quota must have shape \[B\]"),
        (committing(policy="threshold", threshold=-0.1), ValueError, "threshold must be >= 0; got -0.1"),
        (committing(quota=1, active=count), ValueError, "active must be bool; got int64"),
        (committing(quota=1, canvas=scores), ValueError, "canvas must be int64 or int32; got float32"),
        (committing(quota=1, stats=scores), TypeError, "stats must be a RowStats; got Tensor"),
        (committing(quota=1, stats=row_stats(logits[0], impl="reference")), ValueError, r"stats.token must have shape"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("impl", SELECTIONS)
def test_no_gradient_flows(impl, device):
    logits = torch.randn(2, 3, 5, device=device, requires_grad=True)
    stats = row_stats(logits, impl=impl)
    assert not any(value.requires_grad for value in stats)
    count, maskable = torch.ones(2, dtype=torch.int64, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    assert remask(logits[..., 0], count, maskable=maskable, impl=impl).sum() == 2
