"""Times kd_loss, forward and backward, against eager torch: pytest benchmarks/bench_kd_loss.py

Each result is checked against torch before it is timed. `extra_info` holds the ratio to the eager composition (to our
dense path for TopK and LabelPrior, which eager torch has to turn into dense teachers first) and to the floor: one
`torch.add` of the same size (two reads and a write, as the loss reads two sides and writes the gradient).
Memory: run with MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_THRESHOLD_=4294967296, or eager torch pays for fresh pages anew.
The issue's shape is N1024-V32000; add -k N1024 for it, or -k N128 for a quick look.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, linear_kd_loss

SHAPES = [(128, 8000), (1024, 32000), (256, 128256)]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ALPHA, TEMPERATURE = 0.5, 2.0

shapes = pytest.mark.parametrize(("rows", "vocab_size"), SHAPES, ids=[f"N{n}-V{v}" for n, v in SHAPES])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
devices = pytest.mark.parametrize("device", DEVICES)


def eager_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    hard = F.cross_entropy(student, labels)
    log_p = F.log_softmax(student / TEMPERATURE, -1)
    log_q = F.log_softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft


def ours(student: Tensor, teacher, labels: Tensor) -> Tensor:
    return kd_loss(student, teacher, labels, alpha=ALPHA, temperature=TEMPERATURE)


def inputs(rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = [torch.randn(rows, vocab_size, generator=generator, device=device).mul_(3).to(dtype) for _ in range(2)]
    labels = torch.randint(0, vocab_size, (rows,), generator=generator, device=device)
    return logits[0].requires_grad_(), logits[1], labels


def forward_backward(loss, parameters: list[Tensor], *arguments) -> None:
    for parameter in parameters:
        parameter.grad = None
    loss(*arguments).backward()


def seconds(call, repeats: int = 5) -> float:
    """Median of a few runs, after one to warm up; for what the timed function is compared with."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def record(benchmark, call, peer_name: str, peer, student: Tensor, teacher: Tensor) -> None:
    """Time `call`, and note how often it fits into its peer and the floor into it."""
    logits = student.detach()
    compared = seconds(peer)
    floor = seconds(lambda: torch.add(logits, teacher))
    if logits.device.type == "cpu":
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(lambda: (call(), torch.cuda.synchronize()), rounds=20, warmup_rounds=3)
    mine = benchmark.stats.stats.median
    benchmark.extra_info.update(
        peer=peer_name,
        peer_ms=round(compared * 1e3, 3),
        floor_ms=round(floor * 1e3, 3),
        times_faster_than_peer=round(compared / mine, 2),
        times_the_floor=round(mine / floor, 2),
    )


@devices
@dtypes
@shapes
def test_dense(benchmark, rows, vocab_size, dtype, device):
    student, teacher, labels = inputs(rows, vocab_size, dtype, device)
    wide = student.detach()[:8].double().requires_grad_()
    eager_kd_loss(wide, teacher[:8].double(), labels[:8]).backward()
    few = student.detach()[:8].clone().requires_grad_()
    ours(few, teacher[:8], labels[:8]).backward()
    step = {torch.float32: 2**-22, torch.bfloat16: 2**-8}[dtype]
    assert bool(((few.grad.double() - wide.grad).abs() <= 1e-7 + step * wide.grad.abs()).all())
    record(
        benchmark,
        lambda: forward_backward(ours, [student], student, teacher, labels),
        "eager torch",
        lambda: forward_backward(eager_kd_loss, [student], student, teacher, labels),
        student,
        teacher,
    )


@devices
@shapes
def test_top_k(benchmark, rows, vocab_size, device):
    student, teacher, labels = inputs(rows, vocab_size, torch.float32, device)
    log_probs, ids = teacher.log_softmax(-1).topk(64, -1)
    top = TopK(ids, log_probs, "renormalise")
    masked = torch.full_like(teacher, -torch.inf).scatter_(1, ids, log_probs * TEMPERATURE)
    torch.testing.assert_close(
        kd_loss(student, top, labels, temperature=TEMPERATURE, teacher_temperature=1.0),
        ours(student, masked, labels),
    )
    record(
        benchmark,
        lambda: forward_backward(ours, [student], student, top, labels),
        "dense",
        lambda: forward_backward(ours, [student], student, teacher, labels),
        student,
        teacher,
    )


@devices
@shapes
def test_label_prior(benchmark, rows, vocab_size, device):
    student, teacher, labels = inputs(rows, vocab_size, torch.float32, device)
    k = 200
    ids = (torch.arange(vocab_size, device=device)[:, None] + torch.arange(k, device=device) * 31) % vocab_size
    prior = LabelPrior(ids, torch.linspace(2, 1, k, device=device), 1e-4)
    few = labels[:8]
    table = torch.full((8, vocab_size), 1e-4, device=device).scatter_(1, ids[few], prior.weights.expand(8, k)).log()
    torch.testing.assert_close(ours(student[:8], prior, few), ours(student[:8], table, few))
    record(
        benchmark,
        lambda: forward_backward(ours, [student], student, prior, labels),
        "dense",
        lambda: forward_backward(ours, [student], student, teacher, labels),
        student,
        teacher,
    )


@devices
@pytest.mark.parametrize(("rows", "vocab_size"), [(128, 8000), (2048, 32000)], ids=["N128-V8000", "N2048-V32000"])
def test_linear(benchmark, rows, vocab_size, device):
    width = 512
    generator = torch.Generator(device).manual_seed(0)
    hidden, teacher_hidden = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    weight, teacher_weight = (
        torch.randn(vocab_size, width, generator=generator, device=device).mul_(width**-0.5) for _ in range(2)
    )
    labels = torch.randint(0, vocab_size, (rows,), generator=generator, device=device)
    trained = [hidden.requires_grad_(), weight.requires_grad_()]

    def eager(hidden, weight, teacher_hidden, teacher_weight, labels):
        return eager_kd_loss(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), labels)

    def fused(hidden, weight, teacher_hidden, teacher_weight, labels):
        options = {"alpha": ALPHA, "temperature": TEMPERATURE}
        return linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, labels, **options)

    arguments = (hidden, weight, teacher_hidden, teacher_weight, labels)
    few = (hidden[:64], weight, teacher_hidden[:64], teacher_weight, labels[:64])
    torch.testing.assert_close(fused(*few), eager(*few))
    compared = seconds(lambda: forward_backward(eager, trained, *arguments), repeats=3)
    benchmark.pedantic(lambda: forward_backward(fused, trained, *arguments), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        peer="eager torch",
        peer_ms=round(compared * 1e3, 3),
        times_faster_than_peer=round(compared / benchmark.stats.stats.median, 2),
    )
