"""kd_loss: the public function, and the call of a kernel for each kind of teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast.ops.kd_loss import reference
from condgen_fast.ops.kd_loss.autograd import (
    kd_loss_dense,
    kd_loss_dense_over_logits,
    kd_loss_sparse,
    kd_loss_sparse_over_logits,
    kd_loss_triton,
    kd_loss_triton_over_logits,
    overwriting_loss,
)
from condgen_fast.ops.kd_loss.checks import (
    KernelOptions,
    as_rows,
    check_options,
    check_overwriting,
    check_tensors,
    check_top_k,
    choose_impl,
    refuse_forward_mode,
)
from condgen_fast.ops.kd_loss.teachers import TAILS, LabelPrior, TopK, listed_distribution


def kd_loss(
    student_logits: Tensor,  # [..., V]
    teacher: Tensor | TopK | LabelPrior | None,
    labels: Tensor | None = None,  # [...]
    *,
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
    overwrite_logits: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Interpolate the loss on labels with the divergence from a teacher, row by row of student logits.

    ``loss = (1 - alpha) * NLL(student, labels) + alpha * temperature**2 * D(q, p)``: word-level distillation (Kim and
    Rush 2016, arXiv:1606.07947) with the scaling of Hinton et al. (2015, arXiv:1503.02531, section 2). p is the student
    at ``temperature`` and q the teacher at ``teacher_temperature``; gradients flow to the student only and are computed
    together with the loss.

    Args:
        student_logits: [..., V] float32, bfloat16, float16, on the CPU and in the reference also float64. Rows may be
            strided. A row of -inf alone has p = 0 and gets no gradient.
        teacher: logits [..., V'], any floating dtype, with -inf beyond the shorter of V and V' (a wider teacher is cut
            and renormalised); or TopK, or LabelPrior, which say where their mass lies. None is allowed at
            ``alpha = 0``, where the teacher is not read.
        labels: [...] int64 or int32. May be missing at ``alpha = 1`` without a LabelPrior: then every row counts.
        alpha: weight of the divergence, in [0, 1]; at either end the other term is not computed.
        temperature: of the student, and of the teacher where ``teacher_temperature`` is None; > 0 and in [1e-18, 1e18].
            The NLL has none.
        teacher_temperature: q is proportional to the teacher's probabilities to the power 1 / teacher_temperature,
            whichever kind of teacher it is.
        scale_by_temperature_squared: whether ``alpha`` is multiplied by ``temperature**2``.
        divergence: "cross_entropy" -sum q log p; "forward_kl" KL(q || p); "reverse_kl" KL(p || q); "jsd" jsd_beta *
            KL(q || m) + (1 - jsd_beta) * KL(p || m) with m = jsd_beta * q + (1 - jsd_beta) * p; "tvd" sum |p - q| / 2.
            0 log 0 is 0.
        jsd_beta: in (0, 1); the limits are "forward_kl" and "reverse_kl" after division by it.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        z_loss: the NLL carries ``z_loss * logsumexp(student_logits)**2``.
        ignore_index: rows with this label count for nothing, whatever their logits hold.
        weights: [...] factor of every row; rows of weight 0 are not read. They do not change what "mean" divides by.
        reduction: "mean" over the rows that are not ignored (0 with zero gradient if there is none), "sum" or "none".
        overwrite_logits: write the gradient into the memory of ``student_logits``, whose values are lost: no [..., V]
            beyond the inputs. Not float16, nor of a leaf; the backward pass runs once, and what has saved the logits or
            is computed from them later raises in its own.
        impl: "auto" (compiled on the CPU, Triton on CUDA), "reference" or "triton" (on the CPU under
            TRITON_INTERPRET=1). On CUDA, float64 takes the reference.

    Returns:
        float32 (float64 for float64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: a shape, dtype, device, number or choice does not fit; on the CPU also a label out of range and ids
            out of range or twice in a row of a TopK. On a GPU the loss of a row with such a label, or an id out of
            range, is NaN, and ids are not compared with each other.
        TypeError: an argument of a wrong type.

    Memory: the gradient and O(N) beyond the inputs (TopK and LabelPrior: O(N k)). The inputs are kept for a second
    backward pass. Only the reference has a second or a forward-mode derivative, and works under torch.func.

    Equivalent to: ``(1 - alpha) * F.cross_entropy(s, labels) + alpha * T**2 * F.kl_div(log_softmax(s / T),
    log_softmax(t / T), log_target=True, reduction="batchmean")`` for logits s, t [N, V] without ignored labels.
    """
    options = check_options(
        alpha, temperature, teacher_temperature, scale_by_temperature_squared, divergence, jsd_beta, label_smoothing,
        z_loss, ignore_index, reduction, impl,
    )  # fmt: skip
    check_tensors(student_logits, teacher, labels, weights, alpha, ignore_index)
    if alpha == 0:
        teacher = None
    impl = choose_impl(impl, student_logits)
    if overwrite_logits:
        check_overwriting(student_logits, teacher, impl)
    if impl != "compiled":  # which looks for itself
        check_top_k(teacher, student_logits.shape[-1])
    if impl == "reference":
        return reference.kd_loss(
            student_logits, teacher, labels, alpha=alpha, temperature=temperature,
            teacher_temperature=teacher_temperature, scale_by_temperature_squared=scale_by_temperature_squared,
            divergence=divergence, jsd_beta=jsd_beta, label_smoothing=label_smoothing, z_loss=z_loss,
            ignore_index=ignore_index, weights=weights, reduction=reduction,
        )  # fmt: skip
    refuse_forward_mode("kd_loss", student_logits)

    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    labels, coefficient = row_coefficients(labels, weights, ignore_index, reduction, student_logits, dtype)
    losses = row_losses(student_logits, teacher, labels, coefficient, options, impl, overwrite_logits)
    if reduction == "none":
        return losses.view(student_logits.shape[:-1])
    return losses.sum(dtype=torch.float64).to(dtype)


def row_losses(
    student: Tensor,
    teacher,
    labels: Tensor | None,
    coefficient: Tensor,
    options: KernelOptions,
    impl: str,
    overwrite_logits: bool = False,
    with_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Losses [N] times their coefficient [N], by the kernel for this kind of teacher, and parts [N, 8] if wanted."""
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    rows = as_rows(student)
    if isinstance(teacher, Tensor):
        if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
            teacher = teacher.to(coefficient.dtype)
        teacher = as_rows(teacher.detach())
    if impl == "triton":
        op, over_logits = kd_loss_triton, kd_loss_triton_over_logits
        arguments = (*triton_teacher(teacher), labels, coefficient, *triton_kind(teacher), *options)
    elif isinstance(teacher, (TopK, LabelPrior)):
        op, over_logits = kd_loss_sparse, kd_loss_sparse_over_logits
        listed = listed_distribution(teacher, labels, student.shape[-1], options.teacher_temperature, coefficient.dtype)
        arguments = (*listed, labels, coefficient, *options)
    else:
        op, over_logits = kd_loss_dense, kd_loss_dense_over_logits
        arguments = (teacher, labels, coefficient, *options)
    if overwrite_logits and with_gradient:
        return overwriting_loss(student, rows, lambda logits: over_logits(logits, *arguments))
    losses, _, parts = op(rows, *arguments, with_gradient, with_parts)
    return (losses, parts) if with_parts else losses


def triton_teacher(teacher) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Logits, ids and what they list, as the Triton op takes them."""
    if isinstance(teacher, TopK):
        k = teacher.ids.shape[-1]
        return None, *(x.detach().reshape(-1, k).contiguous() for x in (teacher.ids, teacher.log_probs))
    if isinstance(teacher, LabelPrior):
        return None, teacher.ids.contiguous(), teacher.weights.detach().contiguous()
    return teacher, None, None


def triton_kind(teacher) -> tuple[int, float]:
    """Position in ``triton_kernel.KINDS``, and the floor of a LabelPrior."""
    if isinstance(teacher, TopK):
        return 2 + TAILS.index(teacher.tail), 0.0
    if isinstance(teacher, LabelPrior):
        return 5, float(teacher.floor)
    return int(teacher is not None), 0.0


def row_coefficients(
    labels: Tensor | None, weights: Tensor | None, ignore_index: int, reduction: str, logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Labels [N] as int64, and the factor [N] of every row: weight over divisor, 0 where it counts for nothing."""
    rows = logits.shape[:-1].numel()
    if labels is None:
        coefficient = torch.ones(rows, dtype=dtype, device=logits.device)
        count = max(rows, 1)
    else:
        labels = labels.reshape(-1).long()
        counts = labels != ignore_index
        coefficient = counts.to(dtype)
        count = coefficient.sum().clamp_min(1)
    if weights is not None:
        coefficient = torch.where(coefficient > 0, weights.detach().reshape(-1).to(dtype), 0)
    return labels, coefficient / count if reduction == "mean" else coefficient
