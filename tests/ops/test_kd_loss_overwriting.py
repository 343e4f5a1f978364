"""kd_loss with overwrite_logits: the gradient in the memory of the logits, and no silent use of what is lost."""

from __future__ import annotations

import pytest
import torch
from kd_loss_cases import IMPLS, OPTIONS, TEACHERS, make_teacher

from condgen_fast.ops.kd_loss import TopK, kd_loss, triton_kernel
from condgen_fast.ops.kd_loss.checks import DIVERGENCES

pytestmark = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def in_shape(teacher, *rows):
    if isinstance(teacher, torch.Tensor):
        return teacher.view(*rows, -1)
    if isinstance(teacher, TopK):
        return TopK(teacher.ids.view(*rows, -1), teacher.log_probs.view(*rows, -1), teacher.tail)
    return teacher


def with_and_without(leaf, view, teacher, labels, **options):
    """(loss, gradient of the leaf) as usual and overwriting, and whether the latter lost the logits."""
    results = []
    for overwrite in (False, True):
        leaf.grad = None
        logits = view(leaf + 1)
        loss = kd_loss(logits, teacher, labels, overwrite_logits=overwrite, **options)
        (3 * loss.sum()).backward()
        results.append((loss.detach(), leaf.grad))
        assert torch.equal(logits.detach(), view(leaf + 1).detach()) != overwrite
    return results


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_loss_and_gradient(impl, kind, dtype, device, monkeypatch):
    if impl == "triton" and (dtype == torch.float64 or kind not in ("dense", "uniform", "prior")):
        pytest.skip("not by the Triton kernel, or as another kind")
    teacher = in_shape(make_teacher(kind, 6, 40, dtype, device), 2, 3)
    labels = torch.randint(0, 40, (2, 3), device=device)
    leaf = torch.randn(2, 4, 50, device=device).to(dtype).requires_grad_()
    with torch.no_grad():
        leaf[0, 1] = -torch.inf
    slack = 2**-7 if impl == "triton" and dtype == torch.bfloat16 else 0  # the interpreter cuts bfloat16 off
    for swept in (False, True) if impl == "triton" else (False,):
        if swept:
            monkeypatch.setattr(triton_kernel, "tile", lambda *_: (32, 1, False))
        for divergence in ("forward_kl",) if impl == "triton" else DIVERGENCES:
            for name in ("square",) if impl == "triton" else ("square", "all"):
                options = OPTIONS[name] | {"divergence": divergence, "impl": impl}
                labels[1, 1] = options.get("ignore_index", -100)
                usual, over = with_and_without(leaf, lambda x: x[:, :3, 5:45], teacher, labels, **options)
                torch.testing.assert_close(over[0], usual[0], rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(over[1], usual[1], rtol=slack, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "width"), [(3, 4111), (140, 30011)])
@pytest.mark.parametrize("kind", ["dense", "drop"])
def test_rows_of_many_blocks(impl, rows, width, kind, device):
    """Blocks of a row are written while the next row is read; the larger gradient past the caches, in odd lines."""
    if impl == "triton" and device == "cpu":
        pytest.skip("the compiled kernel's blocks")
    teacher = make_teacher(kind, rows, width, torch.float32, device)
    labels = torch.randint(0, width, (rows,), device=device)
    labels[1] = -100
    leaf = torch.randn(rows, width, device=device, requires_grad=True)
    usual, over = with_and_without(leaf, lambda x: x, teacher, labels, temperature=2.0, impl=impl)
    assert torch.equal(usual[0], over[0]) and torch.equal(usual[1], over[1])


def test_lost_logits_are_never_used_silently(impl, device):
    leaf, teacher = torch.randn(3, 10, device=device, requires_grad=True), torch.randn(3, 10, device=device)
    call = dict(teacher=teacher, alpha=1.0, impl=impl, overwrite_logits=True)
    logits = leaf * 2
    loss = kd_loss(logits, **call)
    with pytest.raises(RuntimeError, match="these logits are gone"):  # used again
        logits.logsumexp(-1).sum().backward()
    with pytest.raises(RuntimeError, match="these logits are gone"):
        kd_loss(logits, **call).backward()
    loss = kd_loss(leaf * 2, **call)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # exp saves what it returned
        kd_loss(leaf.exp(), **call).backward()
    logits = leaf * 2
    other = logits.square().sum()
    kd_loss(logits, **call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    whole = leaf * 2
    kd_loss(whole[1:], **{**call, "teacher": teacher[1:]}).backward()  # a view: the whole has changed
    with pytest.raises(RuntimeError, match="these logits are gone"):
        whole.sum().backward()
    with torch.no_grad():  # no gradient, nothing lost
        kept = leaf * 2
        kd_loss(kept, **call)
    assert torch.equal(kept, leaf.detach() * 2)


def test_refusals(impl, device):
    leaf, teacher = torch.randn(3, 10, device=device, requires_grad=True), torch.randn(3, 10, device=device)
    call = dict(teacher=teacher, alpha=1.0, impl=impl, overwrite_logits=True)
    before = leaf.detach().clone()

    def refuse(words, logits, **changes):
        with pytest.raises(ValueError, match=f"overwrite_logits must be False for {words}"):
            kd_loss(logits, **{**call, **changes})

    refuse("a leaf", leaf)
    refuse("a leaf", leaf[:, :], teacher=teacher)
    refuse("float16", (leaf * 2).half())
    refuse(r"logits of strides \[1, 10\]", (leaf * 2).t(), teacher=teacher.t())
    refuse(r"logits of strides \[0, 1\]", (leaf[0] * 2).expand(3, 10))
    logits = leaf * 2
    refuse("a teacher in the same memory", logits, teacher=logits.detach())
    refuse("the reference", logits, impl="reference")
    assert torch.equal(leaf, before) and torch.equal(logits, before * 2)
