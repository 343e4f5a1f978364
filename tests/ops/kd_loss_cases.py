"""Teachers, options and comparisons that the tests of kd_loss share."""

from __future__ import annotations

import torch

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss

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


def linear_inputs(dtype, device, rows=7, width=6, vocab_size=30):
    shapes = {
        "student_hidden": (rows, width), "student_weight": (vocab_size, width), "student_bias": (vocab_size,),
        "teacher_hidden": (rows, 9), "teacher_weight": (vocab_size + 3, 9), "teacher_bias": (vocab_size + 3,),
    }  # fmt: skip
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
