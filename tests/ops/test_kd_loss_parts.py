"""kd_loss_parts against the reference in float64, and against kd_loss and plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, kd_loss_parts
from condgen_fast.ops.kd_loss.checks import DIVERGENCES

IMPLS = ["auto", "triton", "reference"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_teacher(kind, rows, vocab_size, device):
    if kind == "dense":
        return torch.randn(rows, vocab_size + 3, device=device) * 2
    ids = torch.rand(vocab_size if kind == "prior" else rows, vocab_size, device=device).argsort(-1)[:, :3]
    if kind == "prior":
        return LabelPrior(ids, torch.tensor([3.0, 2.0, 1.0], device=device), 0.01)
    return TopK(ids, torch.randn(rows, vocab_size, device=device).log_softmax(-1).gather(1, ids), kind)


def in_float64(teacher):
    if isinstance(teacher, TopK):
        return TopK(teacher.ids, teacher.log_probs.double(), teacher.tail)
    if isinstance(teacher, LabelPrior):
        return LabelPrior(teacher.ids, teacher.weights.double(), teacher.floor)
    return teacher.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "drop", "uniform", "renormalise", "prior"])
def test_against_the_reference(kind, divergence, dtype, device):
    for vocab_size, temperature in ((37, 2.0), (2100, 1.0), (300, 0.7)):
        student = (torch.randn(4, vocab_size, device=device) * 2).to(dtype)
        teacher = make_teacher(kind, 4, vocab_size, device)
        labels = torch.tensor([1, -100, 5, 0], device=device)
        labels[3] = student[3].argmax()
        options = dict(
            divergence=divergence, temperature=temperature, teacher_temperature=1.3, label_smoothing=0.1, z_loss=0.01,
            weights=torch.tensor([0.5, 1.0, 2.0, 1.0], device=device),
        )  # fmt: skip
        for more in ({}, {"reduction": "none"}, {"alpha": 0.0}, {"alpha": 1.0}):
            got = kd_loss_parts(student, teacher, labels, **options, **more)
            wanted = kd_loss_parts(student.double(), in_float64(teacher), labels, impl="reference", **options, **more)
            for name, mine, truth in zip(got._fields, got, wanted, strict=True):
                slack = 1e-12 if dtype == torch.float64 and kind == "dense" else 5e-6
                assert mine.shape == truth.shape
                torch.testing.assert_close(
                    mine.double(), truth, rtol=slack, atol=slack, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("impl", IMPLS)
def test_against_torch(impl, device):
    student, teacher = torch.randn(6, 40, device=device, requires_grad=True), torch.randn(6, 40, device=device)
    labels = torch.randint(0, 40, (6,), device=device)
    teacher[0], teacher[1] = student[0].detach() * 2, -student[1].detach()
    labels[2] = student[2].argmax()
    options = dict(temperature=2.0, teacher_temperature=3.0, impl=impl)
    parts = kd_loss_parts(student, teacher, labels, alpha=0.25, reduction="none", **options)
    close = torch.testing.assert_close
    close(parts.loss, kd_loss(student, teacher, labels, alpha=0.25, reduction="none", **options))
    close(parts.nll, kd_loss(student, None, labels, alpha=0.0, reduction="none", **options))
    close(4 * parts.kd, kd_loss(student, teacher, alpha=1.0, reduction="none", **options))
    close(parts.loss, 0.75 * parts.nll + 0.25 * 4 * parts.kd)
    close(parts.student_log_sum_exp, (student / 2).logsumexp(-1).detach())
    close(parts.teacher_log_sum_exp, (teacher / 3).logsumexp(-1))
    close(parts.student_entropy, torch.distributions.Categorical(logits=student.detach() / 2).entropy())
    close(parts.teacher_entropy, torch.distributions.Categorical(logits=teacher / 3).entropy())
    assert torch.equal(parts.agreement, (student.argmax(-1) == teacher.argmax(-1)).float())
    assert torch.equal(parts.accuracy, (student.argmax(-1) == labels).float())
    assert parts.agreement[:2].tolist() == [1, 0] and parts.accuracy[2] == 1
    assert [x.requires_grad for x in parts] == [True] + [False] * 8

    mean = kd_loss_parts(student, teacher, labels, alpha=0.25, **options)
    for one, rows in zip(mean, parts, strict=True):
        close(one, rows.mean())
    gradient = torch.autograd.grad(mean.loss, student)[0]
    close(gradient, torch.autograd.grad(kd_loss(student, teacher, labels, alpha=0.25, **options), student)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_missing_is_none(impl, device):
    student, labels = torch.randn(2, 5, device=device), torch.tensor([1, 2], device=device)
    parts = kd_loss_parts(student, None, labels, alpha=0.0, impl=impl)
    assert [name for name, value in parts._asdict().items() if value is None] == [
        "kd", "teacher_log_sum_exp", "teacher_entropy", "agreement",
    ]  # fmt: skip
    parts = kd_loss_parts(student, student, alpha=1.0, impl=impl)
    assert parts.nll is None and parts.accuracy is None and parts.agreement == 1
    assert kd_loss_parts(student[:0], student[:0], labels[:0], impl=impl).loss == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_and_empty_rows(impl, device):
    student = torch.tensor([[0.0, 1, 1], [1, 1, 0], [-math.inf] * 3], device=device)
    teacher = torch.tensor([[0.0, 2, 2], [0, 1, 1], [0.0, 0, 0]], device=device)
    parts = kd_loss_parts(student, teacher, torch.tensor([1, 1, 0], device=device), reduction="none", impl=impl)
    assert parts.agreement.tolist() == [1, 0, 0] and parts.accuracy.tolist() == [1, 0, 0]
    assert parts.student_log_sum_exp[2] == -math.inf and parts.student_entropy[2] == 0
    empty = torch.full((1, 3), -math.inf, device=device)
    parts = kd_loss_parts(student[:1], empty, alpha=1.0, reduction="none", impl=impl)
    assert parts.teacher_log_sum_exp == -math.inf and parts.teacher_entropy == 0 and parts.agreement == 0


def test_agreement_with_a_floor_above_what_is_listed(device):
    prior = LabelPrior(torch.tensor([[0], [0], [0]], device=device), torch.tensor([0.1], device=device), 0.5)
    student = torch.tensor([[0.0, 3, 1], [0, 1, 3]], device=device)
    parts = kd_loss_parts(student, prior, torch.tensor([0, 0], device=device), reduction="none")
    assert parts.agreement.tolist() == [1, 0]  # of tokens 1 and 2, which are equal, the lower


def test_compile(device):
    student, teacher = torch.randn(4, 20, device=device, requires_grad=True), torch.randn(4, 20, device=device)
    labels = torch.tensor([1, 2, -100, 3], device=device)

    def step(logits):
        return kd_loss_parts(logits * 2, teacher, labels, temperature=2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(student), step(student), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(student).loss, student), torch.autograd.grad(step(student).loss, student)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["dense", "drop"])
def test_an_infinite_divergence_that_does_not_count_leaves_the_gradient(kind, impl, device):
    student, labels = torch.randn(2, 9, device=device, requires_grad=True), torch.tensor([1, 2], device=device)
    teacher = make_teacher(kind, 2, 9, device)
    if kind == "dense":
        teacher[:, 4] = -math.inf
    parts = kd_loss_parts(student, teacher, labels, alpha=0.0, divergence="reverse_kl", impl=impl)
    assert parts.kd.item() == math.inf
    (gradient,) = torch.autograd.grad(parts.loss, student)
    (wanted,) = torch.autograd.grad(kd_loss(student, None, labels, alpha=0.0, impl="reference"), student)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["uniform", "prior"])
def test_a_masked_student_under_a_teacher_of_all_tokens(kind, impl, device):
    student = torch.randn(2, 30, device=device)
    student[:, 20:] = -math.inf
    teacher, labels = make_teacher(kind, 2, 30, device), torch.tensor([1, 2], device=device)
    got = kd_loss_parts(student, teacher, labels, impl=impl)
    wanted = kd_loss_parts(student.double(), in_float64(teacher), labels, impl="reference")
    for name, mine, truth in zip(got._fields, got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
