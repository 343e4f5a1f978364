"""kd_loss and linear_kd_loss against the reference in float64, for every option, dtype, kind of teacher and
implementation."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from condgen_fast.ops.kd_loss import LabelPrior, TopK, autograd, kd_loss, linear_kd_loss
from condgen_fast.ops.kd_loss.op import DIVERGENCES

IMPLS = ["auto", "triton"]
TEACHERS = ["dense", "wide", "narrow", "drop", "uniform", "renormalise", "prior", "prior_rows"]
SPARSE = TEACHERS[3:]
# Between a float32 result and the reference in float64, relative to the largest value; for the narrow dtypes half a
# unit in the last place of the gradient is added.
SLACK = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPTIONS = {
    "default": {},
    "soft": {"alpha": 1.0, "temperature": 0.5, "teacher_temperature": 1.5},
    "hard": {"alpha": 0.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "square": {"alpha": 0.7, "temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "all": {
        "alpha": 0.3, "temperature": 3.0, "teacher_temperature": 1.5, "scale_by_temperature_squared": False,
        "jsd_beta": 0.2, "label_smoothing": 0.2, "z_loss": 0.02, "ignore_index": 0, "reduction": "none",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_teacher(kind: str, rows: int, vocab_size: int, dtype: torch.dtype, device: str):
    k = min(3, vocab_size)

    def listed_ids(count):
        return torch.rand(count, vocab_size).topk(k).indices.to(device)

    if kind in ("dense", "wide", "narrow"):
        width = {"dense": vocab_size, "wide": vocab_size + 5, "narrow": max(1, vocab_size - 2)}[kind]
        return (torch.randn(rows, width, device=device) * 3).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if kind in ("drop", "uniform", "renormalise"):
        ids = listed_ids(rows)
        log_probs = torch.randn(rows, vocab_size, dtype=real, device=device).log_softmax(-1).gather(1, ids)
        return TopK(ids, log_probs, kind)
    weights = torch.rand(k if kind == "prior" else (vocab_size, k), dtype=real, device=device) + 0.1
    return LabelPrior(listed_ids(vocab_size), weights, 0.01 if kind == "prior" else 0.0)


def in_float64(teacher):
    if isinstance(teacher, TopK):
        return TopK(teacher.ids, teacher.log_probs.double(), teacher.tail)
    if isinstance(teacher, LabelPrior):
        return LabelPrior(teacher.ids, teacher.weights.double(), teacher.floor)
    return None if teacher is None else teacher.double()


def loss_and_gradient(student, teacher, labels, **options):
    student = student.detach().requires_grad_()
    loss = kd_loss(student, teacher, labels, **options)
    generator = torch.Generator(loss.device).manual_seed(1)
    loss.backward(torch.rand(loss.shape, device=loss.device, generator=generator).to(loss.dtype) + 0.5)
    return loss.detach(), student.grad


def assert_close(name, got, wanted, slack):
    """|got - wanted| <= slack * largest finite |wanted|; infinities equal."""
    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    assert torch.equal(got[~finite], wanted[~finite]) or wanted[~finite].isnan().any(), f"{name}: {got} is not {wanted}"
    error = (got - wanted)[finite].abs()
    if error.numel():
        allowed = slack * max(1.0, wanted[finite].abs().max().item())
        assert error.max() <= allowed, f"{name}: off by {error.max():.3g}, allowed {allowed:.3g}"


def check(student, teacher, labels, impl, **options):
    """Loss and gradient of an implementation against the reference in float64 on the same numbers."""
    dtype = student.dtype
    loss, gradient = loss_and_gradient(student, teacher, labels, impl=impl, **options)
    weights = options.pop("weights", None)
    options["weights"] = None if weights is None else weights.double()
    wanted_loss, wanted_gradient = loss_and_gradient(
        student.double(), in_float64(teacher), labels, impl="reference", **options
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    assert loss.shape == wanted_loss.shape and gradient.shape == student.shape
    assert_close("loss", loss, wanted_loss, SLACK[dtype])
    error = (gradient.double() - wanted_gradient).abs()
    # Rounded once as it is written and once as it is scaled by the cotangent; float16's smallest step is 2 ** -24.
    # The interpreter of Triton cuts bfloat16 off where the GPU rounds.
    roundings = 3 if impl == "triton" and student.device.type == "cpu" else 2
    allowed = SLACK[dtype] * max(1.0, wanted_gradient.abs().max().item() if error.numel() else 0.0) + 2**-25
    allowed = allowed + roundings * ROUNDING[dtype] * wanted_gradient.abs()
    assert bool((error <= allowed).all()), f"gradient off by {error.max():.3g}"
    return loss, gradient


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


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_refusals(impl, device):
    s, labels = torch.zeros(2, 5, device=device), torch.tensor([0, 4], device=device)
    top = TopK(torch.tensor([[0, 1], [2, 3]], device=device), torch.full((2, 2), -1.0, device=device))

    def refuse(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            kd_loss(*arguments, **{"impl": impl, **options})

    refuse(TypeError, "student_logits must be a Tensor; got list", [1.0], s, labels)
    refuse(ValueError, "student_logits must be float32.*got int64", labels[None], s, labels)
    refuse(ValueError, "student_logits must have at least one column", s[:, :0], s, labels)
    refuse(TypeError, "teacher must be a Tensor, TopK, LabelPrior or None; got int", s, 3, labels)
    refuse(ValueError, r"teacher must have shape \[2, V\]; got \[1, 5\]", s, s[:1], labels)
    refuse(ValueError, "teacher must be given unless alpha is 0; got None with alpha 0.5", s, None, labels)
    refuse(ValueError, "labels must be given unless alpha is 1; got None with alpha 0.5", s, s)
    refuse(ValueError, r"labels must have shape \[2\]; got \[1\]", s, s, labels[:1])
    refuse(ValueError, "labels must be int64 or int32; got float32", s, s, labels.float())
    refuse(ValueError, r"weights must have shape \[2\]; got \[1\]", s, s, labels, weights=torch.ones(1, device=device))
    refuse(ValueError, r"alpha must be in \[0, 1\]; got 1.5", s, s, labels, alpha=1.5)
    refuse(TypeError, "alpha must be a number; got str", s, s, labels, alpha="half")
    refuse(ValueError, "temperature must be > 0; got 0", s, s, labels, temperature=0)
    refuse(ValueError, r"temperature must be in \[1e-18, 1e\+18\]; got inf", s, s, labels, temperature=math.inf)
    refuse(ValueError, r"temperature must be in .*; got 1e\+200", s, s, labels, temperature=1e200)
    refuse(ValueError, "teacher_temperature must be > 0; got -1", s, s, labels, teacher_temperature=-1)
    refuse(ValueError, r"label_smoothing must be in \[0, 1\]", s, s, labels, label_smoothing=2)
    refuse(ValueError, "z_loss must be >= 0", s, s, labels, z_loss=-1)
    refuse(ValueError, r"jsd_beta must be in \(0, 1\); got 1", s, s, labels, divergence="jsd", jsd_beta=1)
    refuse(ValueError, "divergence must be 'cross_entropy', .* or 'tvd'; got 'kl'", s, s, labels, divergence="kl")
    refuse(
        ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'batchmean'", s, s, labels, reduction="batchmean"
    )
    refuse(ValueError, "impl must be 'auto', 'reference' or 'triton'; got 'cuda'", s, s, labels, impl="cuda")
    refuse(TypeError, "ignore_index must be an int", s, s, labels, ignore_index=None)
    refuse(
        ValueError,
        r"teacher.ids must have shape \[2, k\]; got \[1, 2\]",
        s,
        TopK(top.ids[:1], top.log_probs[:1]),
        labels,
    )
    prior = LabelPrior(torch.arange(4, device=device)[:, None], torch.ones(1, device=device))
    refuse(ValueError, "teacher.ids must have 5 rows, one a label; got 4", s, prior, labels)
    if device == "cpu":
        for label in (5, -1):
            refuse(ValueError, rf"labels must be in \[0, 5\).*got {label}", s, s, torch.tensor([0, label]))
    if impl == "triton":
        refuse(ValueError, "impl must be auto or reference for float64; got triton", s.double(), s, labels)
    if device == "cpu":
        refuse(ValueError, r"teacher.ids must be in \[0, 5\); got 5", s, TopK(top.ids + 2, top.log_probs), labels)
        twice = torch.tensor([[0, 1], [3, 3]])
        refuse(
            ValueError, "teacher.ids must be distinct within a row; got 3 twice", s, TopK(twice, top.log_probs), labels
        )


def test_refusals_of_teachers():
    ids, one = torch.arange(4)[:, None], torch.ones(1)
    with pytest.raises(ValueError, match=r"ids must list at least one token a row; got shape \[4, 0\]"):
        TopK(ids[:, :0], torch.zeros(4, 0))
    with pytest.raises(ValueError, match=r"ids must list at least one token a label; got shape \[4, 0\]"):
        LabelPrior(ids[:, :0], one[:0])
    with pytest.raises(ValueError, match="tail must be"):
        TopK(ids, torch.zeros(4, 1), "mean")
    with pytest.raises(ValueError, match=r"log_probs must have shape \[4, 1\]; got \[1, 4\]"):
        TopK(ids, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"weights must have shape \[1\] or \[4, 1\]; got \[2\]"):
        LabelPrior(ids, torch.ones(2))
    with pytest.raises(ValueError, match="weights must not be negative"):
        LabelPrior(ids, -one)
    with pytest.raises(ValueError, match="weights must have a positive sum"):
        LabelPrior(ids, 0 * one)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 4\); got 4"):
        LabelPrior(ids + 1, one)
    with pytest.raises(ValueError, match="ids must be distinct within a row; got 0 twice"):
        LabelPrior(torch.zeros(4, 2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="floor must be >= 0"):
        LabelPrior(ids, one, -0.1)


def test_unused_teacher_is_not_read(device):
    labels = torch.tensor([1, 2], device=device)
    student = torch.randn(2, 5, device=device)
    for teacher in (None, torch.full((2, 5), math.nan, device=device)):
        loss = kd_loss(student, teacher, labels, alpha=0.0)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels))


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


# --- linear_kd_loss ---


def linear_inputs(dtype, device, rows=7, width=6, vocab_size=30):
    shapes = {
        "student_hidden": (rows, width), "student_weight": (vocab_size, width), "student_bias": (vocab_size,),
        "teacher_hidden": (rows, 9), "teacher_weight": (vocab_size + 3, 9), "teacher_bias": (vocab_size + 3,),
    }  # fmt: skip
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


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


def test_linear_refusals(device):
    inputs = linear_inputs(torch.float32, device)
    labels = torch.zeros(7, dtype=torch.int64, device=device)

    def refuse(error, words, **changes):
        with pytest.raises(error, match=words):
            linear_kd_loss(**{**inputs, "labels": labels, **changes})

    refuse(TypeError, "student_hidden must be a Tensor; got NoneType", student_hidden=None)
    refuse(
        ValueError, r"student_weight must have shape \[V, D\] with D=6; got \[30, 5\]", student_weight=torch.ones(30, 5)
    )
    refuse(ValueError, "student_hidden must have at least one column", student_hidden=torch.ones(7, 0, device=device))
    refuse(ValueError, "student_bias must have shape", student_bias=torch.ones(3, device=device))
    refuse(
        ValueError,
        r"teacher_hidden must have shape \[7, E\]; got \[3, 9\]",
        teacher_hidden=torch.ones(3, 9, device=device),
    )
    refuse(TypeError, "teacher_weight must be a Tensor; got NoneType", teacher_weight=None)
    refuse(ValueError, "teacher_hidden must be given unless alpha is 0", teacher_hidden=None)
    refuse(ValueError, "labels must be given", labels=None)
    refuse(ValueError, "chunk_rows must be >= 1; got 0", chunk_rows=0)


def test_logits_are_never_whole(device, monkeypatch):
    """No chunk has more rows than asked for."""
    seen = []
    op = autograd.kd_loss_dense
    linear = sys.modules["condgen_fast.ops.kd_loss.linear"]
    monkeypatch.setattr(linear, "kd_loss_dense", lambda s, *rest: seen.append(s.shape[1]) or op(s, *rest))
    linear_kd_loss(alpha=1.0, chunk_rows=2, **linear_inputs(torch.float32, device))
    assert seen == [2, 2, 2, 1] or device != "cpu"
