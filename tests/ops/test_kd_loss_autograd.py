"""Derivatives of kd_loss, and the ops as torch.library and torch.compile see them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kd_loss_cases import IMPLS, TEACHERS, make_teacher

from condgen_fast.ops.kd_loss import kd_loss, linear_kd_loss
from condgen_fast.ops.kd_loss.checks import DIVERGENCES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", TEACHERS)
def test_gradcheck(kind, device):
    student = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    teacher = make_teacher(kind, 3, 7, torch.float64, device)
    labels = torch.tensor([1, -100, 6], device=device)
    weights = torch.tensor([0.5, 1.0, 2.0], device=device)
    for divergence in DIVERGENCES:
        if divergence == "reverse_kl" and kind not in ("dense", "wide", "uniform", "prior"):
            continue
        options = dict(
            divergence=divergence, temperature=1.3, label_smoothing=0.1, z_loss=0.1, jsd_beta=0.3, weights=weights
        )
        for reduction in ("mean", "none"):
            loss = partial(kd_loss, teacher=teacher, labels=labels, reduction=reduction, **options)
            assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_gradients_flow_to_the_student_only(impl, device):
    student, teacher = (torch.randn(2, 5, device=device, requires_grad=True) for _ in range(2))
    weights = torch.ones(2, device=device, requires_grad=True)
    kd_loss(student, teacher, torch.tensor([1, 2], device=device), weights=weights, impl=impl).backward()
    assert student.grad is not None and teacher.grad is None and weights.grad is None
    with torch.no_grad():
        assert not kd_loss(student, teacher, alpha=1.0, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice(impl, device):
    """The buffer of the forward pass is handed out once; later passes compute the gradient anew."""
    student, teacher = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(3, 8, device=device)
    loss = kd_loss(student, teacher, alpha=1.0, impl=impl)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 5 * first)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kd_loss(student, teacher, alpha=1.0, impl=impl), student, create_graph=True)


def test_a_traced_gradient_is_scaled_before_it_is_rounded(device):
    """A factor of 1/3, rounded to bfloat16 first, would make every gradient 0.2 % larger."""
    student, teacher = torch.randn(2, 16, 64, device=device).bfloat16()

    def loss(s):
        return kd_loss(s, teacher, alpha=1.0) / 3

    gradients = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = student.detach().clone().requires_grad_()
        call(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_is_refused_not_zero(impl, device):
    student, teacher = torch.randn(2, 4, 7, device=device)
    with pytest.raises(RuntimeError, match='kd_loss has no forward-mode derivative; use impl="reference" for one'):
        torch.func.jvp(lambda s: kd_loss(s, teacher, alpha=1.0, impl=impl), (student,), (student,))
    with pytest.raises(RuntimeError, match="linear_kd_loss has no forward-mode derivative"):
        torch.func.jvp(lambda s: linear_kd_loss(s, teacher, s, student, alpha=1.0, impl=impl), (student,), (student,))
    tangent = torch.func.jvp(lambda s: kd_loss(s, teacher, alpha=1.0, impl="reference"), (student,), (student,))[1]
    assert tangent.abs() > 1e-3


@pytest.mark.parametrize("op", ["kd_loss_dense", "kd_loss_sparse"])
def test_opcheck(op, device):
    if device != "cpu":
        pytest.skip("compiled on the CPU only")
    student = torch.randn(1, 3, 6, requires_grad=True)
    coefficient, labels = torch.ones(3), torch.tensor([0, 1, 2])
    options = (1, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0, True, False)
    if op == "kd_loss_dense":
        arguments = (student, torch.randn(1, 3, 6), labels, coefficient, *options)
    else:
        arguments = (
            student,
            torch.tensor([[0, 1]] * 3),
            torch.full((3, 2), 0.4),
            torch.full((3,), 0.05),
            labels,
            coefficient,
        )
        arguments += options
    torch.library.opcheck(getattr(torch.ops.condgen_fast, op).default, arguments)


@pytest.mark.parametrize("kind", ["dense", "drop", "prior"])
def test_compile(kind, device):
    student = torch.randn(4, 20, device=device, requires_grad=True)
    teacher = make_teacher(kind, 4, 20, torch.float32, device)
    labels = torch.tensor([1, 2, -100, 3], device=device)

    def step(logits):
        return kd_loss(logits * 2, teacher, labels, temperature=2.0, label_smoothing=0.1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 3.0):
        wanted = torch.autograd.grad(scale * step(student), student)[0]
        got = torch.autograd.grad(scale * compiled(student), student)[0]
        torch.testing.assert_close(got, wanted)
