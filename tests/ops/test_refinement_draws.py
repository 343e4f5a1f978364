"""row_stats at a temperature: the draws, and the random numbers they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from refinement_cases import DTYPES, IMPLS, INF, NAN, SELECTIONS, generator, needs_library
from torch import Tensor

from condgen_fast.ops.refinement import row_stats
from condgen_fast.ops.refinement.reference import CHUNK, chunk_noise, philox


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
    logits = (torch.randn(8 if impl == "triton" else 60, 2500, device=device) * 3).to(dtype)
    logits[:, ::7] = -INF
    for temperature in (1e-30, 0.5, 1.0, 3.0, 1e30) if dtype == torch.float32 else (1.0, 0.7):
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
    """Over one chunk and a half: between chunks and within them."""
    wide = torch.zeros(1, 3000, device=device).expand(30_000, 3000)
    for temperature in (1.0, 3.0):
        tokens = row_stats(wide, temperature=temperature, generator=generator(device)).token
        assert_drawn_from(tokens // 60, torch.full((50,), 0.02))
        assert_drawn_from(tokens % 60, torch.full((60,), 1 / 60))


@needs_library
def test_draws_between_chunks_follow_the_softmax(device):
    """Where the base of the sums moves up chunk by chunk, and back down."""
    logits = torch.full((5 * CHUNK,), -INF, device=device)
    heights = [1.0, 4.0, 9.0, 10.0, 8.0]
    for chunk, height in enumerate(heights):
        logits[chunk * CHUNK + 7] = height
    for temperature in (1.0, 2.0):
        rows = logits.expand(20_000, -1)
        tokens = row_stats(rows, temperature=temperature, generator=generator(device, 3)).token
        assert (tokens % CHUNK == 7).all()
        assert_drawn_from(tokens // CHUNK, (torch.tensor(heights, device=device) / temperature).softmax(0))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_most_probable_token_comes_beside_the_drawn_one(impl, device):
    torch.manual_seed(6)
    logits = torch.randn(20, 300, device=device)
    got = row_stats(logits, temperature=3.0, generator=generator(device), impl=impl)
    assert torch.equal(got.best, logits.argmax(-1)) and not torch.equal(got.best, got.token)
    plain = row_stats(logits, impl=impl)
    assert torch.equal(plain.best, got.best) and torch.equal(plain.token, got.best)


@pytest.mark.parametrize("impl", SELECTIONS)
def test_an_infinite_temperature_is_refused(impl):
    temperature = torch.tensor([1.0, INF, 0.0])
    with pytest.raises(ValueError, match="temperature must be finite; got inf"):
        row_stats(torch.zeros(3, 5), temperature=temperature, impl=impl)
    temperature[1] = -INF  # not above 0: the most probable token
    assert row_stats(torch.zeros(3, 5), temperature=temperature, impl=impl).token[1:].tolist() == [0, 0]


def test_the_noise_of_chunks_is_exponential_and_uniform_far_into_the_tails(device):
    exponential, uniform = chunk_noise(torch.tensor([12345], device=device), torch.arange(100, device=device), 20_000)
    assert float(exponential.mean()) == pytest.approx(1.0, abs=4e-3)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=2e-3) and 0 < uniform.min() and uniform.max() < 1
    for most in (math.exp(-5), math.exp(-8), math.exp(-11), math.exp(-13)):
        for values, probability in ((exponential, -math.expm1(-most)), (uniform, most), (1 - uniform, most)):
            want = probability * values.numel()
            assert abs(int((values < most).sum()) - want) < 5 * math.sqrt(want), most
    together = torch.stack([exponential.flatten(), uniform.flatten()])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 5 / math.sqrt(exponential.numel())


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
