"""What the kd_loss family checks of its arguments, and the choice of an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor
from condgen_fast.ops.kd_loss.teachers import FLOAT_DTYPES, ID_DTYPES, LabelPrior, TopK, check_listed_ids

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


def as_rows(logits: Tensor) -> Tensor:
    """Logits as [A, B, V] without a copy where rows are contiguous: kernels take the two outer strides."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.reshape(1, -1, logits.shape[-1])
