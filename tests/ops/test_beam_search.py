"""beam_topk: every implementation against totals in float64 and against the order that its docstring promises."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condgen_fast import _library
from condgen_fast.ops.beam_search import Adjustments, Allowed, BeamTopK, beam_topk

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
impls = pytest.mark.parametrize("impl", ["auto", "reference"])


def exact_totals(
    logits: Tensor,
    scores: Tensor,
    temperature: float = 1.0,
    adjust: Adjustments | None = None,
    allowed: Allowed | None = None,
) -> tuple[Tensor, Tensor]:
    """Totals [B, K, V] in float64, -inf for whatever cannot win, and the logits [B, K, V] that order a row."""
    logits, scores = logits.cpu().float().double(), scores.cpu().float().double()
    logits = logits.masked_fill(logits.isnan(), -INF)
    alive = scores.isfinite() & logits.amax(-1).isfinite()
    totals = scores[..., None] + ((logits - logits.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    B, K, V = logits.shape
    for b in range(B):
        for i in range(K):
            if adjust is not None:
                pairs = zip(adjust.tokens[b, i].tolist(), adjust.amounts[b, i].tolist(), strict=True)
                for token, amount in pairs:
                    if 0 <= token < V:
                        totals[b, i, token] += amount
            if allowed is not None and allowed.first[b, i] >= 0:
                listed = set(allowed.tokens[allowed.first[b, i] : allowed.last[b, i]].tolist())
                totals[b, i, [token for token in range(V) if token not in listed]] = -INF
    return totals.masked_fill(~alive[..., None], -INF), logits


def assert_selects(found: BeamTopK, logits: Tensor, scores: Tensor, k: int, temperature: float = 1.0, **lists) -> None:
    """The contract, for inputs of any kind: `found` has the k best in the promised order."""
    B, K, V = logits.shape
    assert [tuple(part.shape) for part in found] == [(B, k)] * 3
    assert [part.dtype for part in found] == [torch.float32, torch.int64, torch.int64]
    assert all(part.device == logits.device for part in found)
    totals, order = exact_totals(logits, scores, temperature, **lists)
    for b in range(B):
        rows = list(zip(*(part[b].tolist() for part in found), strict=True))
        count = int((totals[b] > -INF).sum())
        real = rows[:count]
        assert rows[count:] == [(-INF, 0, 0)] * (k - len(real))
        keys = [(-score, parent, -order[b, parent, token].item(), token) for score, parent, token in real]
        assert keys == sorted(keys)
        assert len({(parent, token) for _, parent, token in real}) == len(real)
        worst = real[-1][0] if real else -INF
        slack = 1e-6 * (4 + scores[b][scores[b].isfinite()].abs().max().item() if scores[b].isfinite().any() else 0)
        for score, parent, token in real:
            exact = totals[b, parent, token].item()
            assert exact > -INF and abs(score - exact) <= slack + 2e-7 * abs(exact), (score, exact)
        for parent in range(K):
            tokens = [token for _, taken, token in real if taken == parent]
            if not lists:
                assert tokens == order[b, parent].sort(descending=True, stable=True).indices[: len(tokens)].tolist()
            totals[b, parent, tokens] = -INF
        rest = totals[b].max().item() if totals[b].numel() else -INF
        assert rest <= worst + slack + 2e-7 * abs(worst) if worst > -INF else rest == -INF


def random_step(B: int, K: int, V: int, *, dtype=torch.float32, device="cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(B, K, V, generator=generator)).to(dtype)
    return logits.to(device), (-10 * torch.rand(B, K, generator=generator)).to(device)


@impls
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("B", "K", "V", "k"),
    [
        (1, 1, 1, 1),
        (2, 1, 7, 3),
        (3, 5, 1000, 10),
        (2, 4, 1023, 8),
        (2, 4, 1024, 64),
        (1, 2, 1025, 5),
        (1, 3, 9001, 6),
        (1, 1, 40000, 33),
        (2, 3, 70, 100),
        (2, 65, 33, 65),
        (1, 64, 1000, 64),
        (1, 1, 9001, 2000),
    ],
)
def test_random(B, K, V, k, dtype, impl, device):
    logits, scores = random_step(B, K, V, dtype=dtype, device=device)
    for temperature in (1.0, 0.4, 3.0):
        found = beam_topk(logits, scores, k, temperature=temperature, impl=impl)
        assert_selects(found, logits, scores, k, temperature)


@impls
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees_with_torch_where_nothing_ties(dtype, impl, device):
    logits, scores = random_step(5, 4, 3000, dtype=torch.float32, device=device, seed=1)
    logits = logits.to(dtype)
    totals = scores.double()[..., None] + logits.double().log_softmax(-1)
    exact = totals.flatten(1).topk(8)
    found = beam_topk(logits, scores, 8, impl=impl)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(found.parents * 3000 + found.tokens, exact.indices)
    eager = (scores[..., None] + logits.float().log_softmax(-1)).flatten(1).topk(8).values
    ours, theirs = ((each.double() - exact.values).abs().max().item() for each in (found.scores, eager))
    assert ours <= theirs + 1e-6  # one unit in the last place of a total between 8 and 16


@impls
def test_ties_in_a_row_go_to_the_lower_token(impl, device):
    logits = torch.zeros(1, 2, 3000, device=device)
    logits[0, 0, [2900, 5, 1024, 1023]] = 2.0
    found = beam_topk(logits, torch.tensor([[0.0, -100.0]], device=device), 7, impl=impl)
    assert found.tokens.tolist() == [[5, 1023, 1024, 2900, 0, 1, 2]]
    assert found.parents.tolist() == [[0] * 7]


@impls
def test_signed_zeros_tie(impl, device):
    logits = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]], device=device)
    assert beam_topk(logits, torch.zeros(1, 1, device=device), 4, impl=impl).tokens.tolist() == [[0, 1, 2, 3]]


@impls
def test_ties_between_rows_go_to_the_lower_parent(impl, device):
    row, _ = random_step(1, 1, 500, device=device)
    logits = row.expand(1, 3, 500)
    found = beam_topk(logits, torch.full((1, 3), -2.0, device=device), 7, impl=impl)
    assert found.parents.tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert found.tokens[0, 0] == found.tokens[0, 1] == found.tokens[0, 2] == row.argmax()


@impls
def test_rounding_does_not_make_ties_in_a_row(impl, device):
    # the totals of both are the same float32, the logits are not: the higher logit wins, though its token is higher
    logits = torch.tensor([[[1.0, 1.0 + 2**-23]]], device=device)
    found = beam_topk(logits, torch.tensor([[-1000.0]], device=device), 2, impl=impl)
    assert found.scores[0, 0] == found.scores[0, 1]
    assert found.tokens.tolist() == [[1, 0]]


@impls
def test_empty_beams(impl, device):
    logits, scores = random_step(3, 4, 60, device=device)
    scores[0, 1:] = -INF  # the first step of a search
    scores[1] = -INF  # a sentence without any hypothesis
    logits[2, 1:] = NAN  # what stands in an empty beam does not matter
    scores[2, 1:] = -INF
    for k in (5, 60, 70):
        found = beam_topk(logits, scores, k, impl=impl)
        assert_selects(found, logits, scores, k)
    assert found.parents[1].tolist() == found.tokens[1].tolist() == [0] * 70
    assert (found.scores[0] > -INF).sum() == 60


@impls
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype, impl, device):
    logits, scores = random_step(4, 3, 1100, dtype=dtype, device=device)
    logits[0, 0, :1090] = -INF
    logits[0, 1, ::3] = NAN
    logits[0, 2] = NAN
    logits[1, 0, 1050] = INF
    logits[1, 1] = -INF
    logits[2, 0, 0] = logits[2, 1, 1099] = NAN
    logits[3, 0] = torch.finfo(dtype).max
    logits[3, 1] = torch.finfo(dtype).min
    logits[3, 2, 7] = torch.finfo(dtype).max
    scores[2] = torch.tensor([NAN, INF, -1.0])
    for k in (1, 4, 1500, 3400):
        found = beam_topk(logits, scores, k, impl=impl)
        assert_selects(found, logits, scores, k)
        assert not found.scores.isnan().any()


@impls
def test_nan_leaves_the_rest_of_its_row_a_distribution(impl, device):
    logits = torch.tensor([[[NAN, 0.0, 0.0, NAN]]], device=device)
    found = beam_topk(logits, torch.zeros(1, 1, device=device), 4, impl=impl)
    assert found.tokens.tolist() == [[1, 2, 0, 0]]
    torch.testing.assert_close(found.scores.cpu(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log())


@impls
def test_extreme_temperatures(impl, device):
    logits, scores = random_step(2, 3, 40, device=device)
    logits[:, :, 39] = logits[:, :, :39].amax(-1)
    cold = beam_topk(logits, scores, 2, temperature=1e-40, impl=impl)
    expected = (scores - torch.log(torch.tensor(2.0))).amax(1)
    torch.testing.assert_close(cold.scores[:, 0], expected)
    assert torch.equal(cold.parents[:, 0], scores.argmax(1))
    hot = beam_topk(logits, scores, 3, temperature=1e30, impl=impl)
    torch.testing.assert_close(hot.scores[:, 0], (scores - torch.log(torch.tensor(40.0))).amax(1))
    best = scores.argmax(1)
    in_order = logits[torch.arange(2), best].sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(hot.tokens, in_order[:, :3])


@impls
def test_strides(impl, device):
    logits, scores = random_step(4, 6, 2100, device=device)
    views = {
        "transposed": logits.transpose(0, 1),
        "every second beam": logits[:, ::2],
        "part of the vocabulary": logits[:, :, 3:2050],
        "one row for all": logits[:1, :1].expand(3, 5, 2100),
        "every second token": logits[:, :, ::2],
        "vocabulary first": logits.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    }
    for name, view in views.items():
        B, K, _ = view.shape
        some = -torch.arange(B * K, device=device).view(K, B).t().float()
        found = beam_topk(view, some, 6, impl=impl)
        copy = beam_topk(view.contiguous(), some.contiguous(), 6, impl=impl)
        assert all(torch.equal(one, other) for one, other in zip(found, copy, strict=True)), name
        assert_selects(found, view, some, 6)


@impls
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing(shape, impl, device):
    logits = torch.empty(shape, device=device)
    found = beam_topk(logits, torch.zeros(shape[:2], device=device), 4, impl=impl)
    assert [part.tolist() for part in found] == [[[-INF] * 4] * shape[0], [[0] * 4] * shape[0], [[0] * 4] * shape[0]]


def test_the_same_bits_for_any_number_of_threads(device):
    logits, scores = random_step(1, 2, 40000, device=device)
    more, more_scores = random_step(9, 3, 5000, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*beam_topk(logits, scores, 20), *beam_topk(more, more_scores, 6)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_bits_for_any_batch(device):
    logits, scores = random_step(7, 3, 9000, device=device)
    together = beam_topk(logits, scores, 6)
    order = torch.tensor([4, 0, 6, 2, 1, 3, 5], device=device)
    permuted = beam_topk(logits[order], scores[order], 6)
    assert all(torch.equal(one[order], other) for one, other in zip(together, permuted, strict=True))
    for b in range(7):
        alone = beam_topk(logits[b : b + 1], scores[b : b + 1], 6)
        assert all(torch.equal(one[b : b + 1], other) for one, other in zip(together, alone, strict=True))


@impls
@pytest.mark.parametrize(("B", "K", "V", "k"), [(2, 3, 40, 9), (3, 5, 1000, 10), (1, 2, 9001, 40), (2, 64, 70, 64)])
def test_adjusted_totals(B, K, V, k, impl, device):
    generator = torch.Generator().manual_seed(V)
    logits, scores = random_step(B, K, V, device=device)
    best = logits.cpu().topk(12).indices  # where adjusting changes what is found
    some = torch.randint(-3, V + 3, (B, K, 12), generator=generator)
    tokens = torch.cat([best, some, best[..., :3]], 2)
    amounts = 3 * torch.randn(tokens.shape, generator=generator)
    amounts[torch.rand(tokens.shape, generator=generator) < 0.5] = -INF
    adjust = Adjustments(tokens.to(device), amounts.to(device))
    assert_selects(beam_topk(logits, scores, k, adjust=adjust, impl=impl), logits, scores, k, adjust=adjust)
    shared = Adjustments(tokens[:1, :1].expand(B, K, -1).to(device), amounts[:1, :1].expand(B, K, -1).to(device))
    assert_selects(beam_topk(logits, scores, k, adjust=shared, impl=impl), logits, scores, k, adjust=shared)
    everything = torch.arange(V, device=device).expand(B, K, V)
    banned = Adjustments(everything, torch.full((B, K, V), -INF, device=device))
    assert (beam_topk(logits, scores, k, adjust=banned, impl=impl).scores == -INF).all()


@impls
def test_no_adjustment_makes_possible_what_is_not(impl, device):
    logits = torch.tensor([[[NAN, -INF, 0.0, 1.0]]], device=device)
    adjust = Adjustments(torch.tensor([[[0, 1, 2]]], device=device), torch.tensor([[[INF, INF, 2.0]]], device=device))
    found = beam_topk(logits, torch.zeros(1, 1, device=device), 4, adjust=adjust, impl=impl)
    assert found.tokens.tolist() == [[2, 3, 0, 0]] and found.scores[0, 2:].tolist() == [-INF, -INF]


@impls
@pytest.mark.parametrize(("B", "K", "V", "k"), [(3, 4, 40, 9), (2, 5, 5000, 10), (2, 3, 70, 300)])
def test_allowed_tokens(B, K, V, k, impl, device):
    generator = torch.Generator().manual_seed(V)
    logits, scores = random_step(B, K, V, device=device)
    tokens = torch.cat([torch.randperm(V + 4, generator=generator) - 2, torch.tensor([7])]).to(device)
    first = torch.randint(-1, V, (B, K), generator=generator).to(device)
    last = (first + torch.randint(0, 5, (B, K), generator=generator).to(device)).clamp(min=0)
    first[0, :2], last[0, :2] = -1, 0  # not restricted
    first[1, 0], last[1, 0] = 0, V + 4  # to all
    allowed = Allowed(tokens, first, last)
    assert_selects(beam_topk(logits, scores, k, allowed=allowed, impl=impl), logits, scores, k, allowed=allowed)
    adjust = Adjustments(tokens[: V // 2].expand(B, K, -1), torch.full((B, K, V // 2), -INF, device=device))
    found = beam_topk(logits, scores, k, adjust=adjust, allowed=allowed, impl=impl)
    assert_selects(found, logits, scores, k, adjust=adjust, allowed=allowed)


def test_refuses_lists_that_do_not_fit():
    logits, scores, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"adjust.amounts must have shape \[B, K, M\] with B=2, K=3, M=5"):
        beam_topk(logits, scores, 2, adjust=Adjustments(ids[:, :, None].expand(2, 3, 5), torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match="allowed.last must be at most E = 6; got 7"):
        beam_topk(logits, scores, 2, allowed=Allowed(ids.flatten(), ids, ids + 7))


@impls
def test_a_far_higher_logit_late_in_the_row(impl, device):
    """What the powers are taken of is chosen from the first logits of a block."""
    logits = torch.full((1, 3, 9000), -INF, device=device)
    logits[0, :, 3] = torch.tensor([-1e9, 0.0, -3e38])
    logits[0, :, 5000:5004] = torch.tensor([0.0, 200.0, 3e38])[:, None]
    scores = torch.zeros(1, 3, device=device)
    found = beam_topk(logits, scores, 12, impl=impl)
    assert_selects(found, logits, scores, 12)
    torch.testing.assert_close(found.scores, torch.full((1, 12), -1.3862944, device=device))


values = st.sampled_from([-INF, INF, NAN, 0.0, -0.0, 1.0, 1.5, -2.0, 30.0, -60.0]) | st.floats(-50, 50, width=16)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_values(dtype, data):
    B, K, V = (data.draw(st.integers(1, largest)) for largest in (2, 3, 40))
    logits = torch.tensor(data.draw(st.lists(values, min_size=B * K * V, max_size=B * K * V))).view(B, K, V).to(dtype)
    scores = torch.tensor(data.draw(st.lists(values, min_size=B * K, max_size=B * K))).view(B, K)
    k = data.draw(st.integers(1, K * V + 3))
    temperature = data.draw(st.sampled_from([1.0, 0.5, 7.0]))
    for impl in ("auto", "reference"):
        found = beam_topk(logits, scores, k, temperature=temperature, impl=impl)
        assert_selects(found, logits, scores, k, temperature)


def test_no_gradient_flows(device):
    logits, scores = random_step(2, 3, 50, device=device)
    found = beam_topk(logits.requires_grad_(), scores, 4)
    assert not any(part.requires_grad for part in found)


def test_opcheck(device):
    for dtype in FLOATS:
        logits, scores = random_step(2, 3, 50, dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.condgen_fast.beam_topk.default, (logits, scores, 4, 0.7))
    torch.library.opcheck(torch.ops.condgen_fast.beam_topk.default, (logits[:0].mT.mT, scores[:0], 4, 1.0))


def test_compiles_as_one_graph(device):
    def step(logits, scores):
        found = beam_topk(logits * 2, scores, 4, temperature=0.5)
        return found.scores + 1, found.parents, found.tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (2, 5):
        logits, scores = random_step(B, 3, 50, device=device)
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits, scores), step(logits, scores), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, ValueError, r"logits must have shape \[B, K, V\]; got \[3, 4\]"),
        ({"logits": [0.0]}, TypeError, "logits must be a Tensor; got list"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError, "logits must be float32.*; got int64"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores must have shape \[B, K\] with B=2, K=3; got \[2, 4\]"),
        ({"scores": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, "scores must be float32.*; got bool"),
        ({"k": 0}, ValueError, "k must be in .1, 1048576.; got 0"),
        ({"k": 2**40}, ValueError, "k must be in .1, 1048576.; got 1099511627776"),
        ({"k": 2.0}, TypeError, "k must be an int; got float"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0.*; got 0.0"),
        ({"temperature": NAN}, ValueError, "temperature must be > 0.*; got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or 'reference'; got 'fast'"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3), "k": 2} | change
    with pytest.raises(error, match=message):
        beam_topk(**arguments)


@pytest.mark.skipif("CONDGEN_FAST_CPU_CAPABILITY" in os.environ, reason="runs this file, which would run it again")
def test_every_instruction_set():
    """Those that the rest of this file does not run with, at the same time."""
    if not _library.load():
        pytest.skip("the compiled library is missing")
    chosen = "(test_random or agrees or special or nan or bits) and not reference"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    others = {"baseline", "avx2", "avx512"} - {torch.ops.condgen_fast.cpu_capability()}
    runs = [
        subprocess.Popen(
            command,
            env=os.environ | {"CONDGEN_FAST_CPU_CAPABILITY": each, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in sorted(others)
    ]
    for run, (output, _) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, output
