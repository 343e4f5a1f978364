"""linear_kd_loss: kd_loss on hidden states and output matrices, a few rows of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast._check import check_number, check_tensor
from condgen_fast.ops.kd_loss import reference
from condgen_fast.ops.kd_loss.autograd import OPTIONS, kd_loss_dense
from condgen_fast.ops.kd_loss.checks import check_options, check_rows, choose_impl, refuse_forward_mode
from condgen_fast.ops.kd_loss.op import row_coefficients
from condgen_fast.ops.kd_loss.teachers import FLOAT_DTYPES

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}  # logits of one side that are in memory at a time, by default


def linear_kd_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [..., E]
    teacher_weight: Tensor | None,  # [V', E]
    labels: Tensor | None = None,  # [...]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V']
    chunk_rows: int | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_temperature_squared: bool = True,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,  # [...]
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """``kd_loss`` of ``hidden @ weight.T + bias`` on both sides, without ever holding the logits of all rows.

    The gradients of student hidden states, weight and bias are computed with the loss, chunk by chunk (for reduction
    "none" and float16 in the backward pass, which computes the logits again). Logits are float32 (float64) whatever the
    inputs' dtype.

    Args:
        student_hidden: [..., D] float32, bfloat16, float16 or float64.
        student_weight: [V, D]; ``student_bias`` [V] or None.
        teacher_hidden: [..., E]; None is allowed at ``alpha = 0``, with ``teacher_weight`` None.
        teacher_weight: [V', E]; ``teacher_bias`` [V'] or None.
        labels: [...], and all other options, as in ``kd_loss``.
        chunk_rows: rows whose logits are in memory at a time; by default as many as make 2**23 logits (2**27 on CUDA).

    Returns, raises: as ``kd_loss``.

    Memory: O(chunk_rows * (V + V')) beyond the inputs and their gradients; inputs narrower than float32 are widened on
        the CPU.

    Equivalent to: ``kd_loss(F.linear(student_hidden, student_weight, student_bias),
    F.linear(teacher_hidden, teacher_weight, teacher_bias), labels, ...)``.
    """
    options = check_options(
        alpha, temperature, teacher_temperature, scale_by_temperature_squared, divergence, jsd_beta, label_smoothing,
        z_loss, ignore_index, reduction, impl,
    )  # fmt: skip
    device = getattr(student_hidden, "device", None)
    vocab_size = _check_side(student_hidden, student_weight, student_bias, "student", device)
    rows_shape = student_hidden.shape[:-1]
    check_rows(labels, weights, rows_shape, vocab_size, ignore_index, device)
    if alpha < 1 and labels is None:
        raise ValueError(f"labels must be given unless alpha is 1; got None with alpha {alpha}")
    if teacher_hidden is not None:
        _check_side(teacher_hidden, teacher_weight, teacher_bias, "teacher", device)
        if teacher_hidden.shape[:-1] != rows_shape:
            expected = ", ".join(str(size) for size in [*rows_shape, "E"])
            raise ValueError(f"teacher_hidden must have shape [{expected}]; got {list(teacher_hidden.shape)}")
    elif alpha > 0:
        raise ValueError(f"teacher_hidden must be given unless alpha is 0; got None with alpha {alpha}")
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_LOGITS.get(device.type, 2**27) // vocab_size)
    check_number(chunk_rows, "chunk_rows", minimum=1, integer=True)
    if alpha == 0:
        teacher_hidden = teacher_weight = teacher_bias = None

    impl = choose_impl(impl, student_hidden)
    if impl == "reference":
        return reference.linear_kd_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias=student_bias,
            teacher_bias=teacher_bias, alpha=alpha, temperature=temperature, teacher_temperature=teacher_temperature,
            scale_by_temperature_squared=scale_by_temperature_squared, divergence=divergence, jsd_beta=jsd_beta,
            label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, weights=weights,
            reduction=reduction,
        )  # fmt: skip
    refuse_forward_mode("linear_kd_loss", student_hidden, student_weight, student_bias)
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    labels, coefficient = row_coefficients(labels, weights, ignore_index, reduction, student_hidden, dtype)
    trained = (student_hidden, student_weight, student_bias)
    needs = [torch.is_grad_enabled() and value is not None and value.requires_grad for value in trained]
    uniform = reduction != "none"  # one scalar scales the gradients of all rows
    losses = torch.ops.condgen_fast.linear_kd_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        None if teacher_hidden is None else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels,
        coefficient,
        needs,
        uniform,
        chunk_rows,
        impl == "triton",
        *options,
        any(needs) and uniform and all(value is None or value.dtype != torch.float16 for value in trained),
    )[0]
    if reduction == "none":
        return losses.view(rows_shape)
    return losses.sum(dtype=torch.float64).to(dtype)


def _check_side(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, side: str, device) -> int:
    sizes = check_tensor(hidden, f"{side}_hidden", shape="... D", dtypes=FLOAT_DTYPES, device=device)
    if sizes["D"] == 0:
        raise ValueError(f"{side}_hidden must have at least one column; got shape {list(hidden.shape)}")
    sizes = check_tensor(weight, f"{side}_weight", shape="V D", dtypes=FLOAT_DTYPES, device=device, sizes=sizes)
    if sizes["V"] == 0:
        raise ValueError(f"{side}_weight must have at least one row; got shape {list(weight.shape)}")
    if bias is not None:
        check_tensor(bias, f"{side}_bias", shape="V", dtypes=FLOAT_DTYPES, device=device, sizes=sizes)
    return sizes["V"]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, accumulated and returned in ``dtype``."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.to(a.dtype), out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = _product(hidden, weight.t(), dtype)
    return logits if bias is None else logits.add_(bias)


def _linear_kd_loss(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels, coefficient,
    needs, uniform, chunk_rows, triton, *options,
):  # fmt: skip
    if triton:
        from condgen_fast.ops.kd_loss import triton_kernel
    dtype = coefficient.dtype
    height = student_hidden.shape[0]
    needs_hidden, needs_weight, needs_bias = (needed and options[-1] for needed in needs)
    losses = torch.empty_like(coefficient)
    d_hidden = torch.empty_like(student_hidden) if needs_hidden else student_hidden.new_empty(0)
    d_weight = torch.zeros_like(student_weight, dtype=dtype) if needs_weight else None
    d_bias = torch.zeros_like(student_bias, dtype=dtype) if needs_bias else None
    with torch.autocast(student_hidden.device.type, enabled=False):
        for first in range(0, height, chunk_rows):
            chunk = slice(first, min(first + chunk_rows, height))
            hidden = student_hidden[chunk]
            student = _logits(hidden, student_weight, student_bias, dtype)[None]
            teacher = None
            if teacher_hidden is not None:
                teacher = _logits(teacher_hidden[chunk], teacher_weight, teacher_bias, dtype)[None]
            rows = None if labels is None else labels[chunk], coefficient[chunk]
            if triton:  # the gradient takes the place of the logits
                kind = int(teacher is not None)
                gradient = student if options[-1] else None
                arguments = (teacher, None, None, *rows, kind, 0.0, *options[:-1])
                losses[chunk] = triton_kernel.kd_loss_rows(student, *arguments, gradient)
            else:
                losses[chunk], gradient, _ = kd_loss_dense(student, teacher, *rows, *options, False)
            if not options[-1]:
                continue
            gradient = gradient[0]
            if needs_bias:
                d_bias += gradient.sum(0)
            if hidden.device.type == "cuda":
                gradient = gradient.to(hidden.dtype)
            if needs_hidden:
                d_hidden[chunk] = _product(gradient, student_weight, dtype)
            if needs_weight:
                if hidden.device.type == "cpu":  # without a product beside it
                    d_weight.addmm_(gradient.t(), hidden.to(dtype))
                else:
                    d_weight += _product(gradient.t(), hidden, dtype)
    return (
        losses,
        d_hidden,
        d_weight.to(student_weight.dtype) if needs_weight else student_hidden.new_empty(0),
        d_bias.to(student_bias.dtype) if needs_bias else student_hidden.new_empty(0),
    )


def _fake(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels, coefficient,
    needs, uniform, chunk_rows, triton, *options,
):  # fmt: skip
    needs = [needed and options[-1] for needed in needs]
    trained = zip((student_hidden, student_weight, student_bias), needs, strict=True)
    gradients = [torch.empty_like(value) if needed else student_hidden.new_empty(0) for value, needed in trained]
    return torch.empty_like(coefficient), *gradients


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:-1]
    ctx.gradients = list(output[1:]) if inputs[-1] else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_losses, *_):
    if torch.is_grad_enabled():
        raise RuntimeError('linear_kd_loss has no second derivative; use impl="reference" for one')
    needs, uniform = ctx.options[:2]
    others = (None,) * (5 + len(ctx.options) + 1)
    if grad_losses is None:
        return (None, None, None, *others)
    gradients, ctx.gradients = ctx.gradients, None  # handed out once, as in autograd.py
    if gradients is None:
        *tensors, coefficient = ctx.saved_tensors
        gradients = torch.ops.condgen_fast.linear_kd_loss(*tensors, coefficient * grad_losses, *ctx.options, True)[1:]
    else:
        scale = grad_losses[:1].sum()  # the same for all rows; of no rows 0
        if type(grad_losses) is not Tensor:
            gradients = [(gradient.to(scale.dtype) * scale).to(gradient.dtype) for gradient in gradients]
        elif scale.device.type != "cpu" or scale != 1:
            gradients = [gradient.mul_(scale) for gradient in gradients]
    return (*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), *others)


torch.library.define(
    "condgen_fast::linear_kd_loss",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? labels, Tensor coefficient, bool[] needs, bool uniform, "
    f"int chunk_rows, bool triton, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("condgen_fast::linear_kd_loss", ("cpu", "cuda"), _linear_kd_loss)
torch.library.register_fake("condgen_fast::linear_kd_loss", _fake)
torch.library.register_autograd("condgen_fast::linear_kd_loss", _backward, setup_context=_setup_context)
