"""kd_loss against the reference in float64, for every option, dtype, kind of teacher and implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kd_loss_cases import IMPLS, OPTIONS, TEACHERS, check, loss_and_gradient, make_teacher

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss
from condgen_fast.ops.kd_loss.checks import DIVERGENCES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_teacher_and_divergence(kind, divergence, options, device):
    for vocab_size in (1, 2, 37, 300):
        labels = torch.randint(0, vocab_size, (4,), device=device)
        teacher = make_teacher(kind, 4, vocab_size, torch.float32, device)
        if divergence == "reverse_kl" and kind not in ("dense", "wide", "uniform", "prior"):
            continue  # infinite: test_infinite_divergences
        student = torch.randn(4, vocab_size, device=device) * 3
        check(student, teacher, labels, "auto", divergence=divergence, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", TEACHERS)
def test_dtypes(kind, dtype, device):
    for divergence in DIVERGENCES:
        if divergence == "reverse_kl" and kind not in ("dense", "wide", "uniform", "prior"):
            continue
        teacher = make_teacher(kind, 5, 101, dtype, device)
        labels = torch.randint(0, 101, (5,), device=device)
        student = (torch.randn(5, 101, device=device) * 3).to(dtype)
        for reduction in ("sum", "none"):
            check(student, teacher, labels, "auto", divergence=divergence, reduction=reduction, temperature=1.5)


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(dtype, teacher_dtype, device):
    student = (torch.randn(3, 50, device=device)).to(dtype)
    teacher = (torch.randn(3, 50, device=device)).to(teacher_dtype)
    check(student, teacher, torch.tensor([1, 2, 3], device=device), "auto", reduction="sum")
    if dtype != torch.float64:
        check(student, teacher, torch.tensor([1, 2, 3], device=device), "triton", reduction="sum")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_golden_values(impl, device):
    """Computed by hand: z = [1, 2, 3], v = [2, 2, 4]."""
    golden = {
        1: (0.061554, 0.727127, [-0.016476, 0.138221, -0.121745]),
        2: (0.022854, 0.998182, [-0.051236, 0.190509, -0.139273]),
        4: (0.006444, 1.074890, [-0.079174, 0.209709, -0.130535]),
    }
    student = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    teacher = torch.tensor([[2.0, 2.0, 4.0]], device=device)
    for temperature, (kl, cross_entropy, scaled_gradient) in golden.items():
        options = dict(alpha=1.0, temperature=temperature, impl=impl)
        loss, gradient = loss_and_gradient(student, teacher, None, reduction="sum", **options)
        assert loss.item() == pytest.approx(kl * temperature**2, abs=2e-5)
        cotangent = (torch.rand((), generator=torch.Generator(device).manual_seed(1), device=device) + 0.5).item()
        assert (gradient / cotangent).flatten().tolist() == pytest.approx(scaled_gradient, abs=2e-6)
        unscaled = kd_loss(student, teacher, scale_by_temperature_squared=False, divergence="cross_entropy", **options)
        assert unscaled.item() == pytest.approx(cross_entropy, abs=2e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_equals_torch_composition(impl, device):
    student, teacher = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)
    labels = torch.randint(0, 40, (6,), device=device)
    labels[2] = -100
    got = kd_loss(student, teacher, labels, alpha=0.25, temperature=2.0, label_smoothing=0.1, impl=impl)
    hard = F.cross_entropy(student, labels, label_smoothing=0.1)
    kept = labels != -100
    soft = F.kl_div(
        (student[kept] / 2).log_softmax(-1), (teacher[kept] / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(got, 0.75 * hard + 0.25 * 4 * soft)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.6}, {"temperature": 1.7}, {"teacher_temperature": 2.5}, {"scale_by_temperature_squared": False},
        {"divergence": "cross_entropy"}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"divergence": "tvd"},
        {"label_smoothing": 0.3}, {"z_loss": 0.1}, {"ignore_index": 3}, {"reduction": "sum"},
        {"weights": torch.tensor([0.5, 2.0, 1.0])}, {"labels": torch.tensor([4, 3, 2])},
    ],
    ids=lambda change: "-".join(f"{key}" for key in change),
)  # fmt: skip
def test_every_option_matters(change, impl, device):
    base = dict(alpha=0.4, temperature=1.5, label_smoothing=0.1, labels=torch.tensor([3, 1, 0]), impl=impl)
    student, teacher = torch.randn(3, 9, device=device), torch.randn(3, 9, device=device)

    def run(**options):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return loss_and_gradient(student, teacher, **options)

    loss, gradient = run(**base)
    other_loss, other_gradient = run(**{**base, **change})
    assert (loss - other_loss).abs() > 1e-4
    if change != {"divergence": "cross_entropy"}:  # whose gradient is that of forward_kl
        assert (gradient - other_gradient).abs().max() > 1e-4


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_jsd_beta_matters(impl, device):
    student, teacher = torch.randn(3, 9, device=device), torch.randn(3, 9, device=device)
    a, b = (kd_loss(student, teacher, alpha=1.0, divergence="jsd", jsd_beta=beta, impl=impl) for beta in (0.5, 0.1))
    assert abs(a - b) > 1e-3


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_rows_count_for_nothing(impl, device):
    student, teacher = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    labels = torch.tensor([1, -100, 2, -100], device=device)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], device=device)
    student[1], teacher[3], student[3] = math.nan, math.nan, -math.inf
    loss, gradient = loss_and_gradient(student, teacher, labels, weights=weights, impl=impl)
    kept, _ = loss_and_gradient(student[:1], teacher[:1], labels[:1], impl=impl)
    torch.testing.assert_close(loss, kept / 2)  # of the two rows that are not ignored one has weight 0
    assert bool((gradient[1:] == 0).all()) and bool(gradient[0].any())
    per_row = kd_loss(student, teacher, labels, weights=weights, reduction="none", impl=impl)
    assert per_row[1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows(impl, reduction, device):
    for labels in (torch.full((3,), -100), torch.empty(0, dtype=torch.int64)):
        labels = labels.to(device)
        student = torch.randn(*labels.shape, 5, device=device, requires_grad=True)
        loss = kd_loss(student, torch.randn_like(student), labels, reduction=reduction, impl=impl)
        loss.backward()
        assert loss.item() == 0 and bool((student.grad == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_and_strides(impl, device):
    big = torch.randn(3, 6, 45, device=device)
    labels = torch.randint(0, 33, (3, 4), device=device)
    teacher = torch.randn(3, 8, 66, device=device)[:, 2:6, ::2]
    student = big[:, 1:5, 7:40]
    loss, gradient = check(student, teacher, labels, impl, reduction="none")
    assert loss.shape == (3, 4)
    flat = kd_loss(student.reshape(-1, 33), teacher.reshape(-1, 33), labels.flatten(), reduction="none", impl=impl)
    assert torch.equal(flat, loss.flatten())
    check(big.transpose(1, 2), big.transpose(1, 2) * 2, torch.randint(0, 6, (3, 45), device=device), impl)
    check(student[None], teacher[None], labels[None], impl)
    check(student[0, 0], teacher[0, 0], labels[0, 0], impl)
    check(student, TopK(labels[..., None], torch.full((3, 4, 1), -1.0, device=device), "uniform"), labels, "auto")


def test_teacher_kinds_agree(device):
    """All V tokens listed are the dense teacher at every temperature; label smoothing is a LabelPrior."""
    student, teacher = torch.randn(5, 12, device=device), torch.randn(5, 12, device=device)
    ids = torch.rand(5, 12, device=device).argsort(-1)
    log_probs = teacher.log_softmax(-1).gather(1, ids)
    for temperature in (0.7, 1.0, 3.0):
        dense = kd_loss(student, teacher, alpha=1.0, temperature=temperature)
        for tail in ("drop", "uniform", "renormalise"):
            torch.testing.assert_close(
                kd_loss(student, TopK(ids, log_probs, tail), alpha=1.0, temperature=temperature), dense
            )
    labels = torch.randint(0, 12, (5,), device=device)
    identity = torch.arange(12, device=device)[:, None]
    prior = LabelPrior(identity, torch.tensor([0.9 + 0.1 / 12], device=device), 0.1 / 12)
    torch.testing.assert_close(
        kd_loss(student, prior, labels, alpha=1.0, divergence="cross_entropy"),
        F.cross_entropy(student, labels, label_smoothing=0.1),
    )


def test_d2gpo_golden_prior(device):
    """D2GPo (Li 2020) with V = 10, Gaussian of the rank, softmax at T = 2."""
    density = torch.exp(-(torch.arange(10.0) ** 2) / 2) / math.sqrt(2 * math.pi)
    ids = torch.stack([torch.arange(10).roll(y) for y in range(10)]).to(device)
    prior = LabelPrior(ids, torch.exp(density / 2).to(device), 0.0)
    log_p = torch.randn(10, 10, device=device).log_softmax(-1)
    got = kd_loss(
        log_p, prior, torch.arange(10, device=device), alpha=1.0, divergence="cross_entropy", reduction="none"
    )
    q = torch.tensor([0.117618, 0.108739, 0.098985, 0.096562, 0.096355] + [0.096348] * 5, device=device)
    wanted = -(q * log_p.gather(1, ids)).sum(-1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_unused_teacher_is_not_read(device):
    labels = torch.tensor([1, 2], device=device)
    student = torch.randn(2, 5, device=device)
    for teacher in (None, torch.full((2, 5), math.nan, device=device)):
        loss = kd_loss(student, teacher, labels, alpha=0.0)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels))


def test_bytes_do_not_depend_on_threads(device):
    student, teacher = torch.randn(37, 999), torch.randn(37, 999)
    labels = torch.randint(0, 999, (37,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(student, teacher, labels, temperature=2.0))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
