"""What row_stats, remask and commit share: registration, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from refinement_cases import INF, SELECTIONS, needs_library

from condgen_fast.ops.refinement import commit, remask, row_stats


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
    rest = (torch.rand(3, device=device), torch.ones(3, dtype=torch.bool, device=device), 1, 0.0, 2)
    torch.library.opcheck(ops.commit.default, (token, scores, token.int(), maskable, count, *rest))
    torch.library.opcheck(ops.commit.default, (token, scores, token, maskable, None, None, None, 2, 0.0, 0))


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
    decided = commit(
        stats._replace(log_prob=logits.amax(-1)), stats.token, maskable=logits[..., 0] < 9, policy="quota", quota=1,
        impl=impl,
    )  # fmt: skip
    assert decided.committed.sum() == 2
    count, maskable = torch.ones(2, dtype=torch.int64, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    assert remask(logits[..., 0], count, maskable=maskable, impl=impl).sum() == 2
