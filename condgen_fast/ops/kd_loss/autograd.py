"""The kernels as torch.library ops: fakes for tracing, and the gradient, which the forward pass has computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from condgen_fast import _library

OPTIONS = (
    "int divergence, float hard, float soft, float temperature, float teacher_temperature, float jsd_beta, "
    "float label_smoothing, float z_loss, bool with_gradient"
)  # KernelOptions of checks.py, and whether the gradient is wanted


def kd_loss_dense(student: Tensor, teacher: Tensor | None, labels: Tensor | None, coefficient: Tensor, *options):
    """Losses [N], gradient, and parts [N, 8] of them, for rows [A, B, V] against logits [A, B, V'] or none.

    Parts are those of KDLossParts from nll on. The last two of ``options`` say whether gradient and parts are wanted;
    else they are empty.
    """
    return torch.ops.condgen_fast.kd_loss_dense(student, teacher, labels, coefficient, *options)


def kd_loss_sparse(
    student: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    floor: Tensor,
    labels: Tensor | None,
    coefficient: Tensor,
    *options,
):
    """The same against k listed probabilities [N, k] and that of all other tokens [N]."""
    return torch.ops.condgen_fast.kd_loss_sparse(student, ids, probabilities, floor, labels, coefficient, *options)


def kd_loss_triton(
    student: Tensor,
    teacher: Tensor | None,
    ids: Tensor | None,
    listed: Tensor | None,
    labels: Tensor | None,
    coefficient: Tensor,
    kind: int,
    floor: float,
    *options,
):
    """The same by the Triton kernel, against a teacher of any kind (``triton_kernel.KINDS``): logits, or ids and what
    their TopK or LabelPrior lists."""
    return torch.ops.condgen_fast.kd_loss_triton(
        student, teacher, ids, listed, labels, coefficient, kind, floor, *options
    )


def _kd_loss_triton(student, *arguments):
    from condgen_fast.ops.kd_loss import triton_kernel

    *arguments, with_gradient, with_parts = arguments
    gradient = student.new_empty(student.shape if with_gradient else (0,))
    shape = (student.shape[0] * student.shape[1], 8) if with_parts else (0, 0)
    parts = torch.empty(shape, dtype=torch.float32, device=student.device)
    losses = triton_kernel.kd_loss_rows(
        student, *arguments, gradient if with_gradient else None, parts if with_parts else None
    )
    return losses, gradient, parts


def kd_loss_dense_over_logits(student: Tensor, *arguments) -> Tensor:
    """Losses of ``kd_loss_dense``, without its last two options; the gradient replaces the student's logits."""
    return torch.ops.condgen_fast.kd_loss_dense_over_logits(student, *arguments)


def kd_loss_sparse_over_logits(student: Tensor, *arguments) -> Tensor:
    """The same of ``kd_loss_sparse``."""
    return torch.ops.condgen_fast.kd_loss_sparse_over_logits(student, *arguments)


def kd_loss_triton_over_logits(student: Tensor, *arguments) -> Tensor:
    """The same of ``kd_loss_triton``."""
    from condgen_fast.ops.kd_loss import triton_kernel

    return triton_kernel.kd_loss_rows(student, *arguments, student)


def overwriting_loss(logits: Tensor, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Losses that ``compute`` returns of ``rows``, a view of ``logits``, over which it writes the gradient."""
    losses = _OverwritingLoss.apply(rows, compute)
    _Overwritten.apply(logits)
    return losses


class _OverwritingLoss(torch.autograd.Function):
    """The gradient is in the memory of the logits; differentiable once."""

    @staticmethod
    def forward(ctx, rows, compute):
        losses = compute(rows)
        ctx.gradient = rows.detach()
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("kd_loss with overwrite_logits has one backward pass: its logits are gone")
        return _scale_rows_(gradient, grad_losses), None


class _Overwritten(torch.autograd.Function):
    """Marks logits as written to: what has saved them raises in its backward pass, and so does what uses them later."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("these logits are gone: kd_loss with overwrite_logits has written its gradient over them")


def _scale_rows_(gradient: Tensor, scales: Tensor) -> Tensor:
    """Multiply rows of [A, B, V] by scales [N] in place, if any is not 1."""
    if gradient.device.type == "cuda":
        from condgen_fast.ops.kd_loss import triton_kernel

        return triton_kernel.scale_rows_(gradient, scales)
    if gradient.device.type != "cpu" or not bool((scales == 1).all()):
        gradient.mul_(scales.reshape(*gradient.shape[:2], 1))
    return gradient


def _fake(student, *arguments):
    with_gradient, with_parts = arguments[-2:]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = student.new_empty(student.shape[0] * student.shape[1], dtype=dtype)
    gradient = student.new_empty(student.shape if with_gradient else (0,))
    return losses, gradient, losses.new_empty((losses.shape[0], 8) if with_parts else (0, 0))


def _setup_context(ctx, inputs, output):
    ctx.tensor_count = sum(1 for value in inputs if value is None or isinstance(value, Tensor))
    ctx.save_for_backward(*inputs[: ctx.tensor_count])
    *ctx.options, with_gradient, _ = inputs[ctx.tensor_count :]
    # float16 cannot hold a gradient that a loss scaler has not scaled yet: it is computed in the backward pass.
    in_forward = with_gradient and inputs[0].dtype != torch.float16
    ctx.gradient = output[1] if in_forward else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(op):
    def backward(ctx, grad_losses, *_):
        if torch.is_grad_enabled():
            raise RuntimeError('kd_loss has no second derivative; use impl="reference" for one')
        others = (None,) * (ctx.tensor_count + len(ctx.options) + 1)
        if grad_losses is None:
            return (None, *others)
        # The buffer is handed out once: autograd may accumulate into it, so a second backward pass computes it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            *tensors, coefficient = ctx.saved_tensors
            gradient = op(*tensors, coefficient * grad_losses, *ctx.options, True, False)[1]
        elif type(grad_losses) is not Tensor:  # traced: no looking at values, no writing into them
            gradient = (gradient * grad_losses.view(*gradient.shape[:2], 1)).to(gradient.dtype)
        else:
            _scale_rows_(gradient, grad_losses)
        return (gradient, *others)

    return backward


def _register() -> None:
    tensors = "Tensor student, Tensor? teacher, Tensor? ids, Tensor? listed, Tensor? labels, Tensor coefficient"
    torch.library.define(
        "condgen_fast::kd_loss_triton",
        f"({tensors}, int kind, float floor, {OPTIONS}, bool with_parts) -> (Tensor, Tensor, Tensor)",
    )
    torch.library.impl("condgen_fast::kd_loss_triton", ("cpu", "cuda"), _kd_loss_triton)
    ops = {"kd_loss_triton": kd_loss_triton}
    if _library.load() and hasattr(torch.ops.condgen_fast, "kd_loss_dense"):  # not so in an older build
        ops |= {"kd_loss_dense": kd_loss_dense, "kd_loss_sparse": kd_loss_sparse}
    for name, op in ops.items():
        torch.library.register_fake(f"condgen_fast::{name}", _fake)
        torch.library.register_autograd(f"condgen_fast::{name}", _backward(op), setup_context=_setup_context)


_register()
