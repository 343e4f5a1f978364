"""kd_loss: the public function, its checks and the choice of an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor
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
from condgen_fast.ops.kd_loss.teachers import (
    FLOAT_DTYPES,
    ID_DTYPES,
    TAILS,
    LabelPrior,
    TopK,
    check_listed_ids,
    listed_distribution,
)

DIVERGENCES = ("cross_entropy", "forward_kl", "reverse_kl", "jsd", "tvd")  # the kernels know them by position
REDUCTIONS = ("mean", "sum", "none")
IMPLS = ("auto", "reference", "triton")


class KernelOptions(NamedTuple):
    """The numbers every kernel takes, in the order of the op's schema."""

    divergence: int  # position in DIVERGENCES
    hard: float  # factor of the negative log-likelihood, 1 - alpha
    soft: float  # factor of the divergence, alpha or alpha * temperature**2
    temperature: float
    teacher_temperature: float
    jsd_beta: float
    label_smoothing: float
    z_loss: float


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


def as_rows(logits: Tensor) -> Tensor:
    """Logits as [A, B, V] without a copy where rows are contiguous: kernels take the two outer strides."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.reshape(1, -1, logits.shape[-1])


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


def choose_impl(impl: str, student: Tensor) -> str:
    """Resolve "auto", and refuse what an implementation does not do."""
    double = student.dtype == torch.float64
    if impl == "triton" and double:
        raise ValueError("impl must be auto or reference for float64; got triton")
    if impl != "auto":
        return impl
    if student.device.type == "cuda":
        return "reference" if double else "triton"
    if student.device.type != "cpu":
        return "reference"
    _library.require()
    return "compiled"


def check_overwriting(student: Tensor, teacher, impl: str) -> None:
    """Refuse ``overwrite_logits`` where the gradient cannot take the place of the logits, or takes that of others."""
    if impl == "reference":
        raise ValueError("overwrite_logits must be False for the reference; got True")
    if student.dtype == torch.float16:  # whose gradient waits for the scale of the backward pass
        raise ValueError("overwrite_logits must be False for float16 logits; got True")
    owner = student._base if student._is_view() else student
    if owner.is_leaf and owner.requires_grad:
        raise ValueError("overwrite_logits must be False for a leaf, whose values would be lost; got True")
    rows = as_rows(student)
    if rows.data_ptr() != student.data_ptr() or rows_overlap(rows):
        raise ValueError(f"overwrite_logits must be False for logits of strides {list(student.stride())}; got True")
    if isinstance(teacher, Tensor) and teacher.untyped_storage().data_ptr() == student.untyped_storage().data_ptr():
        raise ValueError("overwrite_logits must be False for a teacher in the same memory; got True")


def rows_overlap(rows: Tensor) -> bool:
    """Whether rows [A, B, V] may share memory, as expanded ones do."""
    reach = rows.shape[-1]
    for stride, size in sorted(zip(rows.stride()[:2], rows.shape[:2], strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Refuse dual tensors: a torch.library op without a forward-mode formula drops their tangents without a word."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f'{name} has no forward-mode derivative; use impl="reference" for one')


def check_options(
    alpha, temperature, teacher_temperature, scale_by_temperature_squared, divergence, jsd_beta, label_smoothing,
    z_loss, ignore_index, reduction, impl,
) -> KernelOptions:  # fmt: skip
    """Check everything that is not a tensor."""
    check_choice(impl, "impl", IMPLS)
    check_choice(divergence, "divergence", DIVERGENCES)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_number(alpha, "alpha", minimum=0, maximum=1)
    for value, name in ((temperature, "temperature"), (teacher_temperature, "teacher_temperature")):
        if value is not None or name == "temperature":
            check_number(value, name, minimum=0, exclusive=True)
            # float32 holds temperature**2, and logits divided by it, within these
            check_number(value, name, minimum=1e-18, maximum=1e18)
    if divergence == "jsd":
        check_number(jsd_beta, "jsd_beta", minimum=0, maximum=1, exclusive=True)
    check_number(label_smoothing, "label_smoothing", minimum=0, maximum=1)
    check_number(z_loss, "z_loss", minimum=0)
    check_number(ignore_index, "ignore_index", integer=True)
    return KernelOptions(
        divergence=DIVERGENCES.index(divergence),
        hard=1.0 - alpha,
        soft=alpha * temperature**2 if scale_by_temperature_squared else float(alpha),
        temperature=float(temperature),
        teacher_temperature=float(temperature if teacher_temperature is None else teacher_temperature),
        jsd_beta=float(jsd_beta),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
    )


def check_tensors(student_logits, teacher, labels, weights, alpha: float, ignore_index: int) -> None:
    """Check every tensor of a call."""
    vocab_size = check_tensor(student_logits, "student_logits", shape="... V", dtypes=FLOAT_DTYPES)["V"]
    if vocab_size == 0:
        raise ValueError(f"student_logits must have at least one column; got shape {list(student_logits.shape)}")
    rows_shape = student_logits.shape[:-1]
    check_rows(labels, weights, rows_shape, vocab_size, ignore_index, student_logits.device)
    check_teacher(teacher, labels, alpha, rows_shape, vocab_size, student_logits.device)


def check_top_k(teacher, vocab_size: int) -> None:
    """Check the ids of a TopK on the CPU."""
    if isinstance(teacher, TopK) and teacher.ids.device.type == "cpu":
        check_listed_ids(teacher.ids, "teacher.ids", vocab_size)


def check_rows(
    labels, weights, rows_shape: torch.Size, vocab_size: int, ignore_index: int, device: torch.device
) -> None:
    """Check what has one entry a row: labels and weights."""
    if labels is not None:
        check_tensor(labels, "labels", shape="...", dtypes=ID_DTYPES, device=device)
        if labels.shape != rows_shape:
            raise ValueError(f"labels must have shape {list(rows_shape)}; got {list(labels.shape)}")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
            if bool(wrong.any()):
                raise ValueError(
                    f"labels must be in [0, {vocab_size}) or ignore_index ({ignore_index}); got {int(labels[wrong][0])}"
                )
    if weights is not None:
        check_tensor(weights, "weights", shape="...", dtypes=FLOAT_DTYPES, device=device)
        if weights.shape != rows_shape:
            raise ValueError(f"weights must have shape {list(rows_shape)}; got {list(weights.shape)}")


def check_teacher(
    teacher, labels: Tensor | None, alpha: float, rows_shape: torch.Size, vocab_size: int, device: torch.device
) -> None:
    """Check the teacher of whichever kind, and that there are labels where they are needed."""
    if alpha < 1 and labels is None:
        raise ValueError(f"labels must be given unless alpha is 1; got None with alpha {alpha}")
    if teacher is None:
        if alpha > 0:
            raise ValueError(f"teacher must be given unless alpha is 0; got None with alpha {alpha}")
    elif isinstance(teacher, LabelPrior):
        if labels is None:
            raise ValueError("labels must be given with a LabelPrior; got None")
        if teacher.ids.shape[0] != vocab_size:
            raise ValueError(f"teacher.ids must have {vocab_size} rows, one a label; got {teacher.ids.shape[0]}")
        check_same_device(teacher.ids, "teacher.ids", device)
    elif isinstance(teacher, TopK):
        if teacher.ids.shape[:-1] != rows_shape:
            expected = [*rows_shape, "k"]
            raise ValueError(f"teacher.ids must have shape {expected}; got {list(teacher.ids.shape)}".replace("'", ""))
        check_same_device(teacher.ids, "teacher.ids", device)
    elif isinstance(teacher, Tensor):
        check_tensor(teacher, "teacher", shape="... V", dtypes=FLOAT_DTYPES, device=device)
        if teacher.shape[:-1] != rows_shape or teacher.shape[-1] == 0:
            expected = [*rows_shape, "V"]
            raise ValueError(f"teacher must have shape {expected}; got {list(teacher.shape)}".replace("'", ""))
    else:
        raise TypeError(f"teacher must be a Tensor, TopK, LabelPrior or None; got {type(teacher).__name__}")


def check_same_device(value: Tensor, name: str, device: torch.device) -> None:
    """Refuse a tensor on another device than the student's."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}; got {value.device}")
