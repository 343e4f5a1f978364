"""kd_loss_parts: what kd_loss adds up, and what else the same pass over the logits can tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from condgen_fast.ops.kd_loss import reference
from condgen_fast.ops.kd_loss.checks import (
    check_options,
    check_tensors,
    check_top_k,
    choose_impl,
    refuse_forward_mode,
)
from condgen_fast.ops.kd_loss.op import row_coefficients, row_losses
from condgen_fast.ops.kd_loss.teachers import LabelPrior, TopK


class KDLossParts(NamedTuple):
    """The loss and its parts. Every field is reduced as the loss is: "mean" averages over the rows that count, with
    their weights; "none" has one value a row, times its weight, 0 for ignored rows."""

    loss: Tensor  # as kd_loss returns it; the others carry no gradient
    nll: Tensor | None  # what (1 - alpha) multiplies: smoothed, with z-loss; None without labels
    kd: Tensor | None  # D(q, p), without temperature**2; None without a teacher, as all that is said of it
    student_log_sum_exp: Tensor  # of logits / temperature, so log p = logits / temperature - this
    teacher_log_sum_exp: (
        Tensor | None
    )  # at its temperature; of TopK and LabelPrior the log of the mass in the vocabulary
    student_entropy: Tensor  # -sum p log p, nats; 0 of a row of -inf
    teacher_entropy: Tensor | None
    agreement: Tensor | None  # 1 where p and q have their maximum at the same token, the lowest of equals
    accuracy: Tensor | None  # 1 where the maximum of p is the label; None without labels


def kd_loss_parts(
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
    impl: str = "auto",
) -> KDLossParts:
    """``kd_loss`` with what to watch in training: ``loss = (1 - alpha) * nll + alpha * temperature**2 * kd`` and more.

    Arguments, returned dtype and errors are those of ``kd_loss``. Both terms are computed whenever labels and teacher
    are there, whatever alpha is. p is the student at ``temperature``, q the teacher at ``teacher_temperature``. Only
    the loss is differentiable.

    Equivalent to: ``kd_loss(...)`` at the given alpha, at 0 and at 1, ``(logits / temperature).logsumexp(-1)``,
    ``Categorical(logits=logits / temperature).entropy()``, and comparisons of ``argmax(-1)``.
    """
    options = check_options(
        alpha, temperature, teacher_temperature, scale_by_temperature_squared, divergence, jsd_beta, label_smoothing,
        z_loss, ignore_index, reduction, impl,
    )  # fmt: skip
    check_tensors(student_logits, teacher, labels, weights, alpha, ignore_index)
    impl = choose_impl(impl, student_logits)
    if impl != "compiled":
        check_top_k(teacher, student_logits.shape[-1])
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    labels, coefficient = row_coefficients(labels, weights, ignore_index, reduction, student_logits, dtype)
    if impl == "reference":
        losses, parts = reference.kd_loss_rows(student_logits, teacher, labels, coefficient, options)
    else:
        refuse_forward_mode("kd_loss_parts", student_logits)
        losses, parts = row_losses(student_logits, teacher, labels, coefficient, options, impl, with_parts=True)
    columns = (parts * coefficient[:, None]).unbind(-1)
    rows_shape = student_logits.shape[:-1]
    if reduction == "none":
        loss, *columns = (x.view(rows_shape) for x in (losses, *columns))
    else:
        loss, *columns = (x.sum(dtype=torch.float64).to(dtype) for x in (losses, *columns))
    result = KDLossParts(loss, *columns)
    if labels is None:
        result = result._replace(nll=None, accuracy=None)
    if teacher is None:
        result = result._replace(kd=None, teacher_log_sum_exp=None, teacher_entropy=None, agreement=None)
    return result
