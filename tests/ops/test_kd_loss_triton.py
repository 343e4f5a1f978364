"""The Triton kernel of kd_loss: every teacher, divergence and tile against the reference in float64, and what only a
GPU can show: no synchronisation, capture in a graph, rows beyond 2**31 logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, linear_kd_loss, reference, triton_kernel
from condgen_fast.ops.kd_loss.checks import DIVERGENCES
from condgen_fast.ops.kd_loss.op import triton_kind, triton_teacher

TEACHERS = ["dense", "wide", "narrow", "drop", "uniform", "renormalise", "prior", "prior_rows", "all_listed"]
OPTIONS = [
    {},
    {"alpha": 1.0, "temperature": 0.5, "teacher_temperature": 1.5},
    {"alpha": 0.7, "temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.01},
    {"alpha": 0.3, "temperature": 3.0, "teacher_temperature": 1.5, "jsd_beta": 0.2, "reduction": "none"},
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["resident", "swept"])
def swept(request, monkeypatch):
    """Rows in one tile, and in tiles of 32 columns."""
    if request.param == "swept":
        monkeypatch.setattr(triton_kernel, "tile", lambda *_: (32, 1, False))
    return request.param == "swept"


def make_teacher(kind: str, rows: int, vocab_size: int, device: str):
    k = min(vocab_size, {"all_listed": vocab_size}.get(kind, 3))

    def ids(count):
        return torch.rand(count, vocab_size).topk(k).indices.to(device)

    if kind in ("dense", "wide", "narrow"):
        width = vocab_size + {"dense": 0, "wide": 5, "narrow": -2}[kind]
        return torch.randn(rows, width, device=device) * 3
    if kind in ("prior", "prior_rows"):
        weights = torch.rand((k,) if kind == "prior" else (vocab_size, k), device=device) + 0.1
        return LabelPrior(ids(vocab_size), weights, 0.01 if kind == "prior" else 0.0)
    listed = ids(rows)
    log_probs = torch.randn(rows, vocab_size, device=device).log_softmax(-1).gather(1, listed)
    return TopK(listed, log_probs, "drop" if kind == "all_listed" else kind)


def in_float64(teacher):
    if isinstance(teacher, TopK):
        return TopK(teacher.ids, teacher.log_probs.double(), teacher.tail)
    if isinstance(teacher, LabelPrior):
        return LabelPrior(teacher.ids, teacher.weights.double(), teacher.floor)
    return None if teacher is None else teacher.double()


def loss_and_gradient(student, teacher, labels, **options):
    student = student.detach().requires_grad_()
    loss = kd_loss(student, teacher, labels, **options)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape))
    return loss.detach(), student.grad


def check(student, teacher, labels, **options):
    loss, gradient = loss_and_gradient(student, teacher, labels, impl="triton", **options)
    wanted = loss_and_gradient(student.double(), in_float64(teacher), labels, impl="reference", **options)
    for name, got, truth in zip(("loss", "gradient"), (loss, gradient), wanted, strict=True):
        finite = truth.isfinite()
        assert torch.equal(got[~finite].double(), truth[~finite]), name
        error, largest = ((x[finite].abs().max().item() if finite.any() else 0) for x in (got - truth, truth))
        assert error <= 3e-6 * max(1.0, largest), f"{name} is off by {error:.3g}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_teacher(kind, divergence, swept, device):
    if divergence == "reverse_kl" and kind in ("narrow", "drop", "renormalise", "prior_rows"):
        pytest.skip("infinite: test_infinite")
    for options in OPTIONS[:2] if swept else OPTIONS[2:]:
        labels = torch.randint(0, 37, (2,), device=device)
        teacher = make_teacher(kind, 2, 37, device)
        check(torch.randn(2, 37, device=device) * 3, teacher, labels, divergence=divergence, **options)


@pytest.mark.parametrize("kind", ["dense", "uniform", "prior"])
def test_tiny_vocabularies(kind, device):
    for vocab_size in (1, 2):
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        student = torch.randn(1, vocab_size, device=device)
        for divergence in ("forward_kl", "reverse_kl", "tvd"):
            check(student, make_teacher(kind, 1, vocab_size, device), labels, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_highest_logits_that_move_and_empty_tiles(divergence, swept, device):
    student, teacher = torch.randn(3, 150, device=device) * 3, torch.randn(3, 150, device=device) * 3
    student[0], teacher[1] = student[0].sort().values, teacher[1].sort().values
    student[2, :40] = teacher[2, :70] = -math.inf  # tiles without a finite logit
    if divergence == "reverse_kl":
        student[2, :70] = -math.inf
    labels = torch.tensor([0, 75, 149], device=device)
    check(student, teacher, labels, divergence=divergence, temperature=2.0)
    both = dict(divergence=divergence, temperature=2.0, label_smoothing=0.1)
    check(student[:2] - 500, teacher[:2] + 500, labels[:2], **both)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_student_under_a_listed_teacher(divergence, swept, device):
    """-inf logits of the student at listed tokens of no probability and at tokens without any."""
    student = torch.randn(2, 70, device=device)
    student[:, 40:] = -math.inf
    ids = torch.tensor([[0, 39, 69], [1, 2, 3]], device=device)
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], device=device).log()
    for tail in ("drop", "renormalise"):
        if divergence == "reverse_kl":
            ids = torch.stack([torch.arange(41, device=device)] * 2)
            log_probs = torch.full((2, 41), 1 / 40, device=device).log()
            log_probs[:, 40] = -math.inf
        check(student, TopK(ids, log_probs, tail), None, alpha=1.0, divergence=divergence)


def test_infinite(swept, device):
    finite, half = torch.zeros(1, 4, device=device), torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], device=device)
    drop = TopK(torch.tensor([[0, 1]], device=device), torch.full((1, 2), math.log(0.5), device=device))
    uniform = TopK(drop.ids, drop.log_probs - 1, "uniform")
    for student, teacher, divergence, wanted in (
        (finite, drop, "reverse_kl", math.inf),
        (half, drop, "reverse_kl", 0.0),
        (half, drop, "forward_kl", 0.0),
        (half, uniform, "forward_kl", math.inf),
        (half, uniform, "cross_entropy", math.inf),
    ):
        loss = kd_loss(student, teacher, alpha=1.0, divergence=divergence, impl="triton")
        assert loss.item() == pytest.approx(wanted, abs=1e-6)
    empty = torch.full((1, 20), -math.inf, device=device)
    full = TopK(drop.ids, drop.log_probs, "renormalise")
    loss, gradient = loss_and_gradient(empty, full, None, alpha=1.0, impl="triton")
    assert loss.item() == math.inf and bool((gradient == 0).all())


def test_a_wrong_label_or_id_makes_the_row_nan(device):
    """As on a GPU, where nobody looks at labels first; the entries around stay what they are."""
    student = torch.randn(1, 3, 20, device=device)
    coefficient = torch.ones(3, device=device)
    labels = torch.tensor([2, 20, -1], device=device)
    ids = torch.tensor([[1, 20], [1, 2], [3, 2**40]], device=device)
    options = (1, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0, True, False)
    call = torch.ops.condgen_fast.kd_loss_triton
    losses, gradient, _ = call(student, student * 2, None, None, labels, coefficient, 1, 0.0, *options)
    assert losses.isnan().tolist() == [False, True, True]
    assert gradient.isnan().all(-1).tolist() == [[False, True, True]] and gradient[0, 0].isfinite().all()
    listed = torch.full((3, 2), -1.0, device=device)
    losses, gradient, _ = call(student, None, ids, listed, labels.clamp(0, 3), coefficient, 2, 0.0, *options)
    assert losses.isnan().tolist() == [True, False, True] and gradient[0, 1].isfinite().all()


def test_opcheck_and_compile(device):
    student, teacher = torch.randn(1, 3, 6, device=device, requires_grad=True), torch.randn(1, 3, 6, device=device)
    labels = torch.tensor([0, 1, 2], device=device)
    arguments = (student, teacher, None, None, labels, torch.ones(3, device=device), 1, 0.0)
    options = (1, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0, True, False)
    torch.library.opcheck(torch.ops.condgen_fast.kd_loss_triton.default, arguments + options)

    def step(logits):
        return kd_loss(logits * 2, teacher[0], labels, temperature=2.0, impl="triton")

    wanted = torch.autograd.grad(3 * step(student[0]), student)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(3 * compiled(student[0]), student)[0], wanted)


def test_strided_labels_and_lists(device):
    student = torch.randn(3, 20, device=device)
    labels = torch.tensor([3, 99, 7, 99, 0, 99], device=device)[::2]
    ids = torch.tensor([[1, 99, 5, 99]] * 3, device=device)[:, ::2].int()
    log_probs = torch.full((3, 4), -1.0, device=device)[:, ::2].bfloat16()
    check(student, TopK(ids, log_probs, "uniform"), labels)
    prior = LabelPrior(torch.arange(40, device=device).view(20, 2)[:, :1] // 2, torch.ones(1, device=device), 0.1)
    check(student, prior, labels.int())


def parts_of(student, teacher, labels, *, temperature, teacher_temperature):
    """KDLossParts from nll on, of a student and a teacher, written out in float64."""
    log_p = (student.double() / temperature).log_softmax(-1)
    log_q = reference.teacher_log_probs(teacher, labels, student.shape[-1], teacher_temperature, torch.float64)
    nll = F.cross_entropy(student.double(), labels, label_smoothing=0.1, reduction="none")
    q = log_q.exp()
    lse = (
        (teacher.double() / teacher_temperature).logsumexp(-1) if isinstance(teacher, torch.Tensor) else q.sum(-1).log()
    )
    return torch.stack(
        [
            nll,
            reference.divergence_per_row(log_q, log_p, "forward_kl", 0.5),
            (student.double() / temperature).logsumexp(-1),
            lse,
            -(log_p.exp() * log_p).sum(-1),
            -(q * log_q.masked_fill(q == 0, 0)).sum(-1),
            (log_q.argmax(-1) == student.argmax(-1)).double(),
            (labels == student.argmax(-1)).double(),
        ],
        -1,
    )


@pytest.mark.parametrize(("kind", "alpha"), [("dense", 0.0), ("uniform", 1.0), ("prior", 0.5), ("low_prior", 0.0)])
def test_parts(kind, alpha, swept, device):
    """From the same launch, whatever the factors of the loss; the loss and its gradient stay what they are."""
    vocab_size, rows = 75, 4
    if kind == "low_prior":  # the tokens that are not listed are the most probable ones
        teacher = LabelPrior(torch.arange(vocab_size, device=device)[:, None] % 2, torch.ones(1, device=device), 3.0)
    else:
        teacher = make_teacher(kind, rows, vocab_size, device)
    student = torch.randn(rows, vocab_size, device=device) * 3
    student[1, 40] = student[1, 60] = 20  # equal: the first one
    if isinstance(teacher, torch.Tensor):
        teacher[1, 40] = teacher[1, 60] = 20
        teacher[2, 3] = student[2, 3] = 30
    labels = torch.tensor([5, 40, 0, 9], device=device)
    coefficient = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)
    logits, ids, listed = triton_teacher(teacher if not isinstance(teacher, torch.Tensor) else teacher[None])
    arguments = (student[None], logits, ids, listed, labels, coefficient, *triton_kind(teacher))
    options = (1, 1 - alpha, alpha, 2.0, 1.5, 0.5, 0.1, 0.0)
    losses, gradient, parts = torch.ops.condgen_fast.kd_loss_triton(*arguments, *options, True, True)
    wanted = parts_of(student, teacher, labels, temperature=2.0, teacher_temperature=1.5)
    torch.testing.assert_close(parts[:3].double(), wanted[:3], atol=1e-5, rtol=1e-5)
    assert bool((parts[3] == 0).all())
    loss = ((1 - alpha) * wanted[:, 0] + alpha * wanted[:, 1])[:3]
    torch.testing.assert_close(losses[:3].double(), loss, atol=3e-6, rtol=3e-6)
    alone = torch.ops.condgen_fast.kd_loss_triton(*arguments, *options, True, False)
    assert torch.equal(alone[1], gradient) and alone[2].numel() == 0


def test_scale_rows(device):
    gradient = torch.randn(2, 3, 50, device=device)
    scales = torch.tensor([1.0, 2.0, 0.0, 1.0, -1.0, 0.5], device=device)
    wanted = gradient * scales.view(2, 3, 1)
    assert torch.equal(triton_kernel.scale_rows_(gradient, scales), wanted)
    assert triton_kernel.scale_rows_(gradient[:, :0], scales[:0]).shape == (2, 0, 50)


def test_tiles_fit_the_row():
    for vocab_size in (1, 17, 4096, 4097, 32000, 128256, 262144):
        for row_bytes in (vocab_size * 4, vocab_size * 8):
            for mixture, parts in ((False, False), (True, False), (False, True)):
                block, warps, resident = triton_kernel.tile(vocab_size, row_bytes, mixture, parts)
                assert block & (block - 1) == 0 and (block >= vocab_size) >= resident
                assert resident or 32 * warps * (4 if parts else 8) == block


def gpu_inputs(rows, vocab_size, dtype=torch.bfloat16):
    student = torch.randn(rows, vocab_size, device="cuda").to(dtype).requires_grad_()
    teacher = torch.randn(rows, vocab_size, device="cuda").to(dtype)
    labels = torch.randint(0, vocab_size, (rows,), device="cuda")
    labels[0] = -100
    log_probs, ids = teacher.float().log_softmax(-1).topk(64)
    prior = LabelPrior(
        torch.rand(vocab_size, vocab_size, device="cuda").topk(20).indices, torch.rand(20, device="cuda")
    )
    return student, [teacher, TopK(ids, log_probs, "uniform"), prior], labels


@on_gpu
def test_no_synchronisation():
    student, teachers, labels = gpu_inputs(32, 5000)
    weights = torch.rand(32, device="cuda")

    def step():
        for teacher in teachers:
            for options in ({}, {"reduction": "none"}, {"weights": weights, "label_smoothing": 0.1}):
                loss = kd_loss(student, teacher, labels, temperature=2.0, **options)
                (loss * weights[0]).sum().backward()
            kd_loss(student * 2, teacher, labels, overwrite_logits=True).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_capture_in_a_graph():
    student, teachers, labels = gpu_inputs(32, 5000, torch.float32)
    for teacher in teachers:
        wanted = loss_and_gradient(student, teacher, labels, temperature=2.0)
        static = student.detach().clone().requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            kd_loss(static, teacher, labels, temperature=2.0).backward(torch.full((), 0.5, device="cuda"))
        torch.cuda.synchronize()
        static.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = kd_loss(static, teacher, labels, temperature=2.0)
            loss.backward(torch.full((), 0.5, device="cuda"))
        with torch.no_grad():
            static.copy_(student)
        graph.replay()
        torch.testing.assert_close(loss, wanted[0])
        torch.testing.assert_close(static.grad, wanted[1])


@on_gpu
@pytest.mark.parametrize("vocab_size", [4096, 4097, 32000, 128256])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_real_tiles(vocab_size, divergence, device):
    student, teachers, labels = gpu_inputs(6, vocab_size, torch.float32)
    for teacher in teachers[:2]:
        check(student.detach() * 3, teacher, labels, divergence=divergence, temperature=2.0)


@on_gpu
def test_more_than_2_to_the_31_logits():
    rows, vocab_size = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    student = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    student[-1] = torch.randn(vocab_size, device="cuda")
    last = student[-1:].detach().clone()
    labels = torch.randint(0, vocab_size, (rows,), device="cuda")
    options = dict(reduction="none", alpha=0.5, temperature=2.0)
    got, gradient = loss_and_gradient(student, student, labels, **options)
    wanted = kd_loss(last.double(), last.double(), labels[-1:], impl="reference", **options)
    torch.testing.assert_close(got[-1:].double(), wanted, rtol=1e-5, atol=1e-5)
    assert gradient[-1, labels[-1]] < 0


@on_gpu
def test_linear_on_a_gpu_needs_one_chunk_of_logits():
    hidden = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 8192, (512,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_kd_loss(hidden, weight, teacher, weight.detach(), labels, chunk_rows=64).backward()
    # two sides of a chunk and the gradient in bf16; the gradient of the weight in both dtypes; no [512, 8192]
    assert torch.cuda.max_memory_allocated() - before < 64 * 8192 * (4 + 4 + 2) + 8192 * 64 * 12 + 2**21
