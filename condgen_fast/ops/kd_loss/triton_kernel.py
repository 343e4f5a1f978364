"""Triton kernel of kd_loss for a teacher of logits: one program a row, the sums online, the gradient in the same
launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CROSS_ENTROPY, FORWARD_KL, REVERSE_KL, JSD, TVD = (tl.constexpr(i) for i in range(5))  # DIVERGENCES of op.py
LARGEST_BLOCK = 2048


@triton.jit
def _row_start(row, inner, outer_stride, stride):
    return (row // inner) * outer_stride + (row % inner) * stride


@triton.jit
def _finite_or_zero(highest):
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _derivative(log_p, p, log_q, q, beta, DIVERGENCE: tl.constexpr):
    """Of the divergence with respect to p, up to a constant."""
    if DIVERGENCE == REVERSE_KL:
        return tl.where(p == 0, 0.0, log_p - log_q)
    elif DIVERGENCE == JSD:
        m = beta * q + (1 - beta) * p
        return tl.where(p == 0, 0.0, (1 - beta) * (log_p - tl.log(m)))
    else:
        return tl.where(p > q, 0.5, tl.where(p < q, -0.5, p - q))


@triton.jit
def _kd_loss_kernel(
    student,  # [A, B, V]
    student_outer_stride,
    student_stride,
    teacher,  # [A, B, W or more] or None
    teacher_outer_stride,
    teacher_stride,
    labels,  # [N] or None
    coefficient,  # [N]
    losses,  # [N]
    gradient,  # [N, V] or None
    inner,  # B
    vocab_size,  # V
    shared_size,  # W = min(V, V'): beyond it the teacher is -inf
    hard,
    soft,
    inverse_temperature,
    inverse_teacher_temperature,
    beta,
    label_smoothing,
    z_loss,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(coefficient + row)
    columns = tl.arange(0, BLOCK)
    if factor == 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            gradient += row * vocab_size
            for start in range(0, vocab_size, BLOCK):
                column = start + columns
                zeros = tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty)
                tl.store(gradient + column, zeros, mask=column < vocab_size)
        return
    student += _row_start(row, inner, student_outer_stride, student_stride)
    if SOFT:
        teacher += _row_start(row, inner, teacher_outer_stride, teacher_stride)

    # Sums relative to the highest logits so far: x = s - s_shift, z = x / T, y = (t - t_shift) / T_t
    s_highest, t_highest = -float("inf"), -float("inf")
    s_sum, t_sum, hard_sum, x_sum, dot = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + columns
        inside = column < vocab_size
        s = tl.load(student + column, mask=inside, other=-float("inf")).to(tl.float32)
        s_before, s_shift_before = s_highest, _finite_or_zero(s_highest)
        s_highest = tl.maximum(s_highest, tl.max(s))
        s_shift = _finite_or_zero(s_highest)
        moved = s_shift_before - s_shift
        z_moved = moved * inverse_temperature
        s_scale = tl.where(s_before == -float("inf"), 0.0, tl.exp(z_moved))
        x = s - s_shift
        z = x * inverse_temperature
        e = tl.exp(z)
        if HARD:
            hard_scale = tl.where(s_before == -float("inf"), 0.0, tl.exp(moved))
            hard_sum = hard_sum * hard_scale + tl.sum(tl.exp(x))
            x_sum = x_sum + moved * start + tl.sum(tl.where(inside, x, 0.0))
        if SOFT:
            t = tl.load(teacher + column, mask=column < shared_size, other=-float("inf")).to(tl.float32)
            t_before, t_shift_before = t_highest, _finite_or_zero(t_highest)
            t_highest = tl.maximum(t_highest, tl.max(t))
            t_shift = _finite_or_zero(t_highest)
            y_moved = (t_shift_before - t_shift) * inverse_teacher_temperature
            t_scale = tl.where(t_before == -float("inf"), 0.0, tl.exp(y_moved))
            y = (t - t_shift) * inverse_teacher_temperature
            q = tl.exp(y)
            if DIVERGENCE == CROSS_ENTROPY:
                dot = (dot + t_sum * z_moved) * t_scale + tl.sum(tl.where(q == 0, 0.0, q * z))
            elif DIVERGENCE == FORWARD_KL:
                dot = (dot + t_sum * (y_moved - z_moved)) * t_scale + tl.sum(tl.where(q == 0, 0.0, q * (y - z)))
            elif DIVERGENCE == REVERSE_KL:
                dot = (dot + s_sum * (z_moved - y_moved)) * s_scale + tl.sum(tl.where(e == 0, 0.0, e * (z - y)))
            t_sum = t_sum * t_scale + tl.sum(q)
        s_sum = s_sum * s_scale + tl.sum(e)

    s_shift, t_shift = _finite_or_zero(s_highest), _finite_or_zero(t_highest)
    dead = s_sum == 0  # a row of -inf has no distribution, and gets no gradient
    s_log = tl.log(s_sum)
    hard_log = tl.log(hard_sum)
    t_log = tl.where(t_sum == 0, 0.0, tl.log(t_sum))
    mass = tl.where(t_sum == 0, 0.0, 1.0)

    divergence = 0.0
    ratio = 0.0  # sum of p * r, r the derivative of the divergence
    if SOFT:
        if DIVERGENCE == CROSS_ENTROPY or DIVERGENCE == FORWARD_KL:
            divergence = tl.where(t_sum == 0, 0.0, dot / t_sum)
            if DIVERGENCE == CROSS_ENTROPY:
                divergence = mass * s_log - divergence
            else:
                divergence += mass * (s_log - t_log)
            divergence = tl.where(dead, tl.where(t_sum == 0, 0.0, float("inf")), divergence)
        elif DIVERGENCE == REVERSE_KL:
            divergence = tl.where(dead, 0.0, dot / s_sum - s_log + t_log)
            ratio = divergence
        else:
            for start in range(0, vocab_size, BLOCK):
                column = start + columns
                s = tl.load(student + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
                t = tl.load(teacher + column, mask=column < shared_size, other=-float("inf")).to(tl.float32)
                log_p = tl.where(dead, -float("inf"), (s - s_shift) * inverse_temperature - s_log)
                log_q = (t - t_shift) * inverse_teacher_temperature - t_log
                p, q = tl.exp(log_p), tl.exp(log_q)
                r = _derivative(log_p, p, log_q, q, beta, DIVERGENCE)
                ratio += tl.sum(p * r)
                if DIVERGENCE == TVD:
                    divergence += tl.sum(0.5 * tl.abs(p - q))
                else:
                    m = beta * q + (1 - beta) * p
                    divergence += tl.sum(p * r + tl.where(q == 0, 0.0, beta * q * (log_q - tl.log(m))))

    loss = 0.0
    if SOFT:
        loss += soft * divergence
    label = -1
    wrong = False
    if LABELS:
        label = tl.load(labels + row)
        wrong = (label < 0) | (label >= vocab_size)
    lse = s_shift + hard_log
    if HARD:
        gold = tl.load(student + tl.where(wrong, 0, label)).to(tl.float32)
        nll = tl.where(label_smoothing < 1, (1 - label_smoothing) * (hard_log - (gold - s_shift)), 0.0)
        nll += tl.where(label_smoothing > 0, label_smoothing * (hard_log - x_sum / vocab_size), 0.0)
        nll += tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
        loss += hard * tl.where(dead, float("inf"), nll)
    tl.store(losses + row, tl.where(wrong, float("nan"), factor * loss))

    if GRADIENT:
        gradient += row * vocab_size
        scale = factor * soft * inverse_temperature
        hard_factor = factor * hard * (1 + 2 * z_loss * lse)
        even = factor * hard * label_smoothing / vocab_size
        at_label = factor * hard * (1 - label_smoothing)
        for start in range(0, vocab_size, BLOCK):
            column = start + columns
            inside = column < vocab_size
            x = tl.load(student + column, mask=inside, other=-float("inf")).to(tl.float32) - s_shift
            g = tl.zeros([BLOCK], tl.float32)
            if SOFT:
                t = tl.load(teacher + column, mask=column < shared_size, other=-float("inf")).to(tl.float32)
                log_p = x * inverse_temperature - s_log
                log_q = (t - t_shift) * inverse_teacher_temperature - t_log
                p, q = tl.exp(log_p), tl.exp(log_q)
                if DIVERGENCE == CROSS_ENTROPY or DIVERGENCE == FORWARD_KL:
                    g += scale * (p * mass - q)
                else:
                    g += scale * p * (_derivative(log_p, p, log_q, q, beta, DIVERGENCE) - ratio)
            if HARD:
                g += hard_factor * tl.exp(x - hard_log) - even - tl.where(column == label, at_label, 0.0)
            g = tl.where(wrong, float("nan"), tl.where(dead, 0.0, g))
            tl.store(gradient + column, g.to(gradient.dtype.element_ty), mask=inside)


def kd_loss_dense(
    student: Tensor,  # [A, B, V]
    teacher: Tensor | None,  # [A, B, V']
    labels: Tensor | None,  # [N] int64
    coefficient: Tensor,  # [N] float32
    divergence: int,
    hard: float,
    soft: float,
    temperature: float,
    teacher_temperature: float,
    jsd_beta: float,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [N] float32 and gradient [A, B, V] (empty without ``with_gradient``)."""
    if student.stride(-1) != 1:
        student = student.contiguous()
    if teacher is not None and teacher.stride(-1) != 1:
        teacher = teacher.contiguous()
    outer, inner, vocab_size = student.shape
    losses = torch.empty(outer * inner, dtype=torch.float32, device=student.device)
    gradient = student.new_empty(student.shape if with_gradient else (0,))
    if losses.numel() == 0:
        return losses, gradient
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(vocab_size)))
    with torch.cuda.device_of(student):
        _kd_loss_kernel[(outer * inner,)](
            student,
            student.stride(0),
            student.stride(1),
            teacher if soft > 0 else None,
            teacher.stride(0) if soft > 0 else 0,
            teacher.stride(1) if soft > 0 else 0,
            labels,
            coefficient,
            losses,
            gradient if with_gradient else None,
            inner,
            vocab_size,
            min(vocab_size, teacher.shape[-1]) if soft > 0 else 0,
            hard,
            soft,
            1 / temperature,
            1 / teacher_temperature,
            jsd_beta,
            label_smoothing,
            z_loss,
            DIVERGENCE=divergence,
            HARD=hard > 0,
            SOFT=soft > 0,
            GRADIENT=with_gradient,
            LABELS=labels is not None,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )
    return losses, gradient


def compile_cases():
    """Kernels, signatures, constants and warps to compile ahead of time (CI: for sm_90, without spills)."""
    strides = {f"{side}_{stride}": "i64" for side in ("student", "teacher") for stride in ("outer_stride", "stride")}
    numbers = "hard soft inverse_temperature inverse_teacher_temperature beta label_smoothing z_loss".split()
    for dtype in ("bf16", "fp16", "fp32"):
        signature = {
            "student": f"*{dtype}",
            "teacher": f"*{dtype}",
            "labels": "*i64",
            "coefficient": "*fp32",
            "losses": "*fp32",
            "gradient": f"*{dtype}",
            "inner": "i32",
            "vocab_size": "i32",
            "shared_size": "i32",
            **strides,
            **dict.fromkeys(numbers, "fp32"),
        }
        for divergence in range(5):
            yield (
                _kd_loss_kernel,
                signature,
                {
                    "DIVERGENCE": divergence,
                    "HARD": True,
                    "SOFT": True,
                    "GRADIENT": True,
                    "LABELS": True,
                    "BLOCK": LARGEST_BLOCK,
                },
                8,
            )
