"""kd_loss where floating point is at its limits: -inf, rows without a distribution, large logits, many of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_loss_cases import IMPLS, check, loss_and_gradient

from condgen_fast.ops.kd_loss import TopK, kd_loss
from condgen_fast.ops.kd_loss.checks import DIVERGENCES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_on_either_side(divergence, impl, device):
    student, teacher = torch.randn(4, 40, device=device), torch.randn(4, 40, device=device)
    labels = torch.tensor([30, 31, 32, 33], device=device)
    teacher[0, :20] = student[0, :20] = -math.inf
    teacher[1, 1:] = -math.inf  # one-hot
    student[1, 5:9] = -math.inf
    if divergence != "reverse_kl":
        teacher[2, ::3] = -math.inf
    else:
        teacher[1] = 0
    if divergence in ("reverse_kl", "jsd", "tvd"):
        student[3, ::4] = -math.inf
    labels[0] = 25
    check(student, teacher, labels, impl, divergence=divergence, reduction="sum", alpha=1.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_divergences(impl, device):
    finite, half = torch.zeros(1, 4, device=device), torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], device=device)
    loss, gradient = loss_and_gradient(half, finite, None, alpha=1.0, impl=impl)
    assert loss.item() == math.inf and bool(gradient.isfinite().all())  # p - q needs no logarithm
    assert kd_loss(finite, half, alpha=1.0, divergence="reverse_kl", impl=impl).item() == math.inf
    assert kd_loss(finite, half[:, :2], alpha=1.0, divergence="reverse_kl", impl=impl).item() == math.inf
    drop = TopK(torch.tensor([[0, 1]], device=device), torch.full((1, 2), math.log(0.5), device=device))
    assert kd_loss(finite, drop, alpha=1.0, divergence="reverse_kl").item() == math.inf
    assert kd_loss(half, drop, alpha=1.0).item() == pytest.approx(0, abs=1e-6)
    uniform = TopK(drop.ids, drop.log_probs - 1, "uniform")
    assert kd_loss(half, uniform, alpha=1.0).item() == math.inf
    assert math.isfinite(kd_loss(finite, uniform, alpha=1.0, divergence="reverse_kl"))
    smoothed = kd_loss(half, None, torch.tensor([0], device=device), alpha=0.0, label_smoothing=0.1, impl=impl)
    assert smoothed.item() == math.inf  # as torch


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_infinity_that_later_logits_outweigh(divergence, impl, device):
    """A token that only one side can have, which a logit far on in the row makes impossible on the other as well."""
    student, teacher = torch.zeros(2, 5000, device=device)
    one_sided, other = (teacher, student) if divergence == "reverse_kl" else (student, teacher)
    one_sided[0] = -math.inf
    other[4500] = 1000
    check(student[None], teacher[None], None, impl, divergence=divergence, alpha=1.0)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_probabilities_whose_half_is_zero(impl, device):
    student, teacher = torch.linspace(0, -110, 3000, device=device), torch.full((3000,), -200.0, device=device)
    teacher[0] = 0
    check(student[None], teacher[None], None, impl, divergence="jsd", alpha=1.0)
    check(teacher[None], student[None], None, impl, divergence="jsd", alpha=1.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_distribution(divergence, impl, device):
    """Rows of -inf alone: never NaN, no gradient from a student's, as the reference says; NaN stays NaN."""
    empty, row = torch.full((1, 20), -math.inf, device=device), torch.randn(1, 20, device=device)
    options = dict(alpha=1.0, divergence=divergence, jsd_beta=0.3)
    for student, teacher in ((empty, row), (empty, empty)):
        _, gradient = check(student, teacher, None, impl, **options)
        assert bool((gradient == 0).all())
    if divergence != "reverse_kl":
        check(row, empty, None, impl, **options)
    loss, gradient = loss_and_gradient(row * math.nan, row, None, impl=impl, **options)
    assert loss.isnan() and bool(gradient.isnan().all())
    assert kd_loss(row, row * math.nan, impl=impl, **options).isnan()
    label = torch.tensor([3], device=device)
    assert kd_loss(empty, None, label, alpha=0.0, z_loss=0.1, label_smoothing=0.1, impl=impl).item() == math.inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(scale, temperature, impl, device):
    """No worse than eager torch in float32: here both are compared with float64."""
    student = (torch.rand(4, 64, device=device) * 2 - 1) * scale
    teacher = student + torch.randn(4, 64, device=device)
    labels = student.argmax(-1)
    options = dict(alpha=0.5, temperature=temperature, scale_by_temperature_squared=False)
    wanted = loss_and_gradient(student.double(), teacher.double(), labels, impl="reference", **options)
    eager = loss_and_gradient(student, teacher, labels, impl="reference", **options)
    ours = loss_and_gradient(student, teacher, labels, impl=impl, **options)
    for mine, torchs, truth in zip(ours, eager, wanted, strict=True):
        error, bar = ((x.double() - truth).abs().max().item() for x in (mine, torchs))
        assert math.isfinite(error) and error <= 1.5 * bar + 2e-6 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_an_impossible_label_costs_infinity(label_smoothing, impl, device):
    student = torch.tensor([[0.0, -math.inf, 1.0]], device=device)
    options = {"alpha": 0.0, "label_smoothing": label_smoothing, "impl": impl}
    assert kd_loss(student, None, torch.tensor([1], device=device), **options) == math.inf


def test_float16_survives_a_loss_scale(device):
    """1 / rows would underflow in float16 if the gradient were rounded before the scale is known."""
    student = torch.randn(512, 64, device=device).half().requires_grad_()
    teacher = torch.randn(512, 64, device=device)
    (kd_loss(student, teacher, alpha=1.0) * 2.0**16).backward()
    wanted = student.detach().double().requires_grad_()
    kd_loss(wanted, teacher.double(), alpha=1.0, impl="reference").backward()
    torch.testing.assert_close(student.grad.double() / 2**16, wanted.grad, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 5.0, 20.0])
def test_no_worse_than_eager_torch(temperature, dtype, device):
    """Rows of large logits, -inf on either side, a one-hot teacher and an almost certain student."""
    logits = torch.randn(2, 6, 3000, device=device)
    student, teacher = logits[0], logits[1]
    student[0] *= 10
    teacher[1] *= 30
    student[2], teacher[2] = student[2] * 3e3, student[2] * 3e3 + teacher[2]
    student[3, 100:1500] = teacher[3, 50:1600] = -math.inf
    teacher[4], teacher[4, 7] = -math.inf, 0.0
    student[5, 11] = 40.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.tensor([0, 1, int(student[2].argmax()), 2000, 7, 11], device=device)
    for alpha in (0.0, 0.5, 1.0):

        def eager(s, t, alpha=alpha):
            hard = F.cross_entropy(s.float() if s.dtype != torch.float64 else s, labels, reduction="none")
            log_p, log_q = ((x.to(hard.dtype) / temperature).log_softmax(-1) for x in (s, t))
            soft = torch.where(log_q == -math.inf, 0, log_q.exp() * (log_q - log_p.masked_fill(log_q == -math.inf, 0)))
            return ((1 - alpha) * hard + alpha * soft.sum(-1)).sum()

        def ours(s, t, alpha=alpha):
            return kd_loss(
                s, t, labels, alpha=alpha, temperature=temperature, scale_by_temperature_squared=False, reduction="sum"
            )

        results = []
        for loss, s, t in (
            (eager, student.double(), teacher.double()), (eager, student, teacher), (ours, student, teacher),
        ):  # fmt: skip
            leaf = s.clone().requires_grad_()
            value = loss(leaf, t)
            results.append((value.detach().double(), torch.autograd.grad(value, leaf)[0].double()))
        for truth, theirs, mine in zip(*results, strict=True):
            bar, error = (theirs - truth).abs().max(), (mine - truth).abs().max()
            assert error <= 1.5 * bar + 1e-6 * truth.abs().max(), f"{error:.3g} where torch has {bar:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_of_many_megabytes(sparse, dtype, device):
    """It is written past the caches; rows do not begin at a cache line."""
    rows, vocab_size = 80 if dtype == torch.float32 else 160, 60013
    student = torch.randn(rows, vocab_size, device=device).to(dtype)
    teacher = torch.randn(rows, vocab_size, device=device).to(dtype)
    if sparse:
        log_probs, ids = teacher.float().log_softmax(-1).topk(50, -1)
        teacher = TopK(ids, log_probs, "uniform")
    labels = torch.randint(0, vocab_size, (rows,), device=device)
    labels[3] = -100
    gradient = loss_and_gradient(student, teacher, labels, temperature=2.0, reduction="none")[1]
    for few in (slice(0, 5), slice(rows - 5, rows)):
        part = TopK(teacher.ids[few], teacher.log_probs[few], "uniform") if sparse else teacher[few]
        wanted = loss_and_gradient(student[few], part, labels[few], temperature=2.0, reduction="none")[1]
        cotangents = [
            torch.rand(n, generator=torch.Generator(device).manual_seed(1), device=device) + 0.5 for n in (5, rows)
        ]
        scale = cotangents[1][few] / cotangents[0]
        torch.testing.assert_close(gradient[few].float(), wanted.float() * scale[:, None], rtol=2e-2, atol=1e-9)
    assert not bool(gradient[3].any())


def test_rows_beyond_two_to_the_31(device):
    """Rows that lie more than 2**31 logits apart; the memory between them is never touched."""
    if device != "cpu":
        pytest.skip("tests of the GPU have their own")
    apart, width = 2**31 + 64, 500
    memory = torch.from_numpy(np.empty(apart + 2 * width, dtype=np.float16)).view(torch.bfloat16)
    student, teacher = (memory[first:].as_strided((2, width), (apart, 1)) for first in (0, width))
    student.copy_(torch.randn(2, width))
    teacher.copy_(torch.randn(2, width))
    labels = torch.tensor([3, 4])
    got = loss_and_gradient(student, teacher, labels, reduction="sum")
    wanted = loss_and_gradient(student.clone(), teacher.clone(), labels, reduction="sum")
    assert all(map(torch.equal, got, wanted))
