"""linear_kd_loss against its reference and against kd_loss on the logits."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from kd_loss_cases import IMPLS, OPTIONS, ROUNDING, SLACK, assert_close, linear_inputs

from condgen_fast.ops.kd_loss import autograd, kd_loss, linear_kd_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear_loss_and_gradients(inputs, labels, **options):
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
    loss = linear_kd_loss(labels=labels, **inputs, **options)
    (
        loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    ).sum().backward()
    return loss.detach(), {name: value.grad for name, value in inputs.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear(reduction, dtype, impl, device):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("no float64 in Triton")
    inputs = linear_inputs(dtype, device)
    labels = torch.tensor([0, 5, -100, 29, 3, 3, 7], device=device)
    options = dict(temperature=2.0, label_smoothing=0.1, reduction=reduction)
    wide = {name: value.double() for name, value in inputs.items()}
    wanted, wanted_gradients = linear_loss_and_gradients(wide, labels, impl="reference", **options)
    for chunk_rows in (1, 3, 7, 100, None):
        loss, gradients = linear_loss_and_gradients(inputs, labels, impl=impl, chunk_rows=chunk_rows, **options)
        assert_close("loss", loss, wanted, 3e-6 if dtype != torch.float64 else 1e-12)
        for name, gradient in gradients.items():
            if name.startswith("teacher"):
                assert gradient is None
                continue
            assert gradient.dtype == dtype
            slack = 2 * ROUNDING[dtype] + SLACK[dtype]
            if dtype == torch.bfloat16:
                slack += 2**-8  # the scale of the cotangent is applied to the rounded gradient
            assert_close(name, gradient, wanted_gradients[name], slack)
        if impl == "triton":
            break


def test_linear_equals_kd_loss(device):
    inputs = linear_inputs(torch.float32, device, rows=6)
    inputs = {name: value.view(2, 3, -1) if "hidden" in name else value for name, value in inputs.items()}
    labels = torch.randint(0, 30, (2, 3), device=device)
    student = F.linear(*(inputs[f"student_{name}"] for name in ("hidden", "weight", "bias")))
    teacher = F.linear(*(inputs[f"teacher_{name}"] for name in ("hidden", "weight", "bias")))
    for options in [*OPTIONS.values(), {"divergence": "jsd"}, {"weights": torch.rand(2, 3, device=device)}]:
        got = linear_kd_loss(labels=labels, chunk_rows=4, **inputs, **options)
        torch.testing.assert_close(got, kd_loss(student, teacher, labels, **options))
    got = linear_kd_loss(inputs["student_hidden"], inputs["student_weight"], None, None, labels, alpha=0.0)
    torch.testing.assert_close(got, F.cross_entropy((student - inputs["student_bias"]).flatten(0, 1), labels.flatten()))


def test_linear_computes_only_what_is_trained(device):
    inputs = linear_inputs(torch.float32, device)
    inputs["student_hidden"].requires_grad_()
    linear_kd_loss(alpha=1.0, **inputs).backward()
    assert inputs["student_hidden"].grad is not None and inputs["student_weight"].grad is None
    loss = linear_kd_loss(alpha=1.0, **{n: v.detach() for n, v in inputs.items()})
    assert not loss.requires_grad
    empty = {name: value[:0] if "hidden" in name else value for name, value in inputs.items()}
    hidden = empty["student_hidden"].detach().requires_grad_()
    weight = inputs["student_weight"].clone().requires_grad_()
    loss = linear_kd_loss(alpha=1.0, **{**empty, "student_hidden": hidden, "student_weight": weight})
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 6) and bool((weight.grad == 0).all())


def test_linear_backward_twice(device):
    inputs = linear_inputs(torch.float32, device)
    weight = inputs["student_weight"].requires_grad_()
    loss = linear_kd_loss(alpha=1.0, chunk_rows=2, **inputs)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close(weight.grad, 3 * first)


def test_linear_compile_and_opcheck(device):
    inputs = linear_inputs(torch.float32, device)
    labels = torch.randint(0, 30, (7,), device=device)
    weight = inputs["student_weight"].requires_grad_()

    def step():
        return linear_kd_loss(labels=labels, chunk_rows=3, **inputs)

    wanted = torch.autograd.grad(2 * step(), weight)[0]
    got = torch.autograd.grad(2 * torch.compile(step, fullgraph=True, backend="aot_eager")(), weight)[0]
    torch.testing.assert_close(got, wanted)
    arguments = [inputs[f"{s}_{n}"] for s in ("student", "teacher") for n in ("hidden", "weight", "bias")]
    arguments += [labels, torch.ones(7, device=device), [False, True, False], True, 3, False]
    arguments += [1, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0, True]
    torch.library.opcheck(torch.ops.condgen_fast.linear_kd_loss.default, tuple(arguments))


def test_logits_are_never_whole(device, monkeypatch):
    """No chunk has more rows than asked for."""
    seen = []
    op = autograd.kd_loss_dense
    linear = sys.modules["condgen_fast.ops.kd_loss.linear"]
    monkeypatch.setattr(linear, "kd_loss_dense", lambda s, *rest: seen.append(s.shape[1]) or op(s, *rest))
    linear_kd_loss(alpha=1.0, chunk_rows=2, **linear_inputs(torch.float32, device))
    assert seen == [2, 2, 2, 1] or device != "cpu"
