"""Launches the Triton kernel of kd_loss, and scales a gradient that the forward pass has computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from condgen_fast.ops.kd_loss.triton_rows import kd_loss_kernel

KINDS = {"none": 0, "dense": 1, "drop": 2, "uniform": 3, "renormalise": 4, "prior": 5}  # of teacher; triton_terms.py
LARGEST_RESIDENT = 4096  # columns of a row that is read once; wider rows spill, and are read twice
REGISTERS = 64  # of a thread, of rows that are swept; left alone the assembler takes 32 for 32 warps, and spills
ROWS_IN_CACHE = ((2**15, 8), (2**17, 16))  # bytes of a row of both sides, and warps that leave so many rows in L1


def tile(vocab_size: int, row_bytes: int, mixture: bool, parts: bool) -> tuple[int, int, bool]:
    """(columns a step, warps, whether that is the whole row) for a row of V logits and so many bytes on both sides.

    A wide row is swept twice, backwards the second time. The more bytes it has the more warps work on it, so that fewer
    rows are under way on a multiprocessor (65536 registers, 64 a thread) and the second sweep finds them in its L1
    (up to 200 kB) or in L2. A divergence of three sweeps (``mixture``) always takes most warps: with fewer it spills;
    and so do parts with 8 columns a thread.
    """
    if vocab_size <= LARGEST_RESIDENT:
        block = max(16, triton.next_power_of_2(vocab_size))
        return block, min(8, max(1, block // 256)), True
    warps = 32
    if not mixture:
        warps = next((warps for largest, warps in ROWS_IN_CACHE if row_bytes <= largest), warps)
    return (128 if parts else 256) * warps, warps, False


def kd_loss_rows(
    student: Tensor,  # [A, B, V]
    teacher: Tensor | None,  # [A, B, V'] logits
    ids: Tensor | None,  # [N, k], of a LabelPrior [V, k]
    listed: Tensor | None,  # like ids, or [k]
    labels: Tensor | None,  # [N]
    coefficient: Tensor,  # [N] float32
    kind: int,
    floor: float,
    divergence: int,
    hard: float,
    soft: float,
    temperature: float,
    teacher_temperature: float,
    jsd_beta: float,
    label_smoothing: float,
    z_loss: float,
    gradient: Tensor | None,  # [A, B, V], may be student itself
    parts: Tensor | None = None,  # [N, 8] float32
) -> Tensor:
    """Losses [N] float32; fills gradient and parts, for which labels and teacher are read whatever the factors are."""
    outer, inner, vocab_size = student.shape
    losses = torch.empty(outer * inner, dtype=torch.float32, device=student.device)
    if losses.numel() == 0:
        return losses
    if soft == 0 and parts is None:
        kind = KINDS["none"]
    dense = kind == KINDS["dense"]
    sparse = kind > KINDS["dense"]
    k = ids.shape[-1] if sparse else 1
    row_bytes = vocab_size * (student.element_size() + (teacher.element_size() if dense else 0))
    block, warps, resident = tile(vocab_size, row_bytes, divergence >= (3 if dense else 2), parts is not None)
    with torch.cuda.device_of(student):
        kd_loss_kernel[(outer * inner,)](
            student,
            student.stride(0),
            student.stride(1),
            teacher if dense else None,
            teacher.stride(0) if dense else 0,
            teacher.stride(1) if dense else 0,
            ids if sparse else None,
            listed if sparse else None,
            k if sparse and listed.dim() > 1 else 0,
            None if labels is None else labels.contiguous(),
            coefficient.contiguous(),
            losses,
            gradient,
            gradient.stride(0) if gradient is not None else 0,
            gradient.stride(1) if gradient is not None else 0,
            parts,
            inner,
            vocab_size,
            min(vocab_size, teacher.shape[-1]) if dense else 0,
            k,
            floor,
            hard,
            soft,
            1 / temperature,
            1 / teacher_temperature,
            jsd_beta,
            label_smoothing,
            z_loss,
            DIVERGENCE=divergence,
            KIND=kind,
            HARD=hard > 0 or (parts is not None and labels is not None),
            TEMPERATURE=int(temperature) if temperature in (1, 2) else 0,
            SMOOTH=label_smoothing > 0,
            GRADIENT=gradient is not None,
            LABELS=labels is not None,
            PARTS=parts is not None,
            SOFT_COUNTS=soft > 0 and kind != KINDS["none"],
            HARD_COUNTS=hard > 0,
            RESIDENT=resident,
            LISTED=max(16, triton.next_power_of_2(k)),
            BLOCK=block,
            num_warps=warps,
            maxnreg=None if resident else REGISTERS,
        )
    return losses


@triton.jit
def _scale_rows_kernel(gradient, outer_stride, stride, scales, inner, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    if scale == 1:
        return
    gradient += (row // inner) * outer_stride + (row % inner) * stride
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + column, mask=column < width, other=0).to(tl.float32)
        tl.store(gradient + column, (value * scale).to(gradient.dtype.element_ty), mask=column < width)


def scale_rows_(gradient: Tensor, scales: Tensor) -> Tensor:
    """Multiply rows of [A, B, V] by scales [N] in place; rows of scale 1 are not touched, which the device decides.

    Equivalent to: ``gradient.mul_(scales.view(A, B, 1))``.
    """
    outer, inner, width = gradient.shape
    if gradient.numel():
        block = min(4096, max(16, triton.next_power_of_2(width)))
        with torch.cuda.device_of(gradient):
            _scale_rows_kernel[(outer * inner,)](
                gradient, gradient.stride(0), gradient.stride(1), scales.contiguous(), inner, width, BLOCK=block
            )
    return gradient


def compile_cases() -> Iterator[tuple]:
    """Kernels, signatures, constants and warps to compile ahead of time (CI: for sm_90, without spills)."""
    numbers = "floor hard soft inverse_temperature inverse_teacher_temperature beta label_smoothing z_loss".split()
    strides = [name for name in kd_loss_kernel.arg_names if name.endswith("stride")]

    def case(
        dtype, kind, divergence, vocab_size, *, k=1, temperature=2, smooth=False, teacher_dtype=None, parts=False
    ):  # fmt: skip
        element = {"fp32": 4, "bf16": 2, "fp16": 2}
        dense, sparse = kind == "dense", kind in ("uniform", "prior", "drop")
        row_bytes = vocab_size * (element[dtype] + (element[teacher_dtype or dtype] if dense else 0))
        block, warps, resident = tile(vocab_size, row_bytes, divergence >= (3 if dense else 2), parts)
        pointers = {"student": dtype, "labels": "i64", "coefficient": "fp32", "losses": "fp32", "gradient": dtype}
        pointers |= {"teacher": teacher_dtype or dtype} if dense else {}
        pointers |= {"ids": "i64", "listed": "fp32"} if sparse else {}
        pointers |= {"parts": "fp32"} if parts else {}
        constants = {
            "DIVERGENCE": divergence, "KIND": KINDS[kind], "HARD": True, "TEMPERATURE": temperature, "SMOOTH": smooth,
            "GRADIENT": True, "LABELS": True, "PARTS": parts, "SOFT_COUNTS": kind != "none", "HARD_COUNTS": True,
            "RESIDENT": resident, "LISTED": triton.next_power_of_2(k), "BLOCK": block,
        }  # fmt: skip
        constants |= {name: None for name in ("teacher", "ids", "listed", "parts") if name not in pointers}
        signature = {name: f"*{kind}:16" for name, kind in pointers.items()} | dict.fromkeys(numbers, "fp32")
        aligned = ":16" if vocab_size % 16 == 0 else ""
        signature |= dict.fromkeys(strides, f"i64{aligned}") | dict.fromkeys(("inner", "k"), "i32")
        signature |= dict.fromkeys(("vocab_size", "shared_size"), f"i32{aligned}")
        return kd_loss_kernel, signature, constants, warps, {"maxnreg": None if resident else REGISTERS}

    for dtype in ("bf16", "fp32"):
        for vocab_size in (4096, 8000, 32000, 50257, 128256):
            for divergence in range(5):
                yield case(dtype, "dense", divergence, vocab_size)
            yield case(dtype, "dense", 1, vocab_size, temperature=0, smooth=True)
            yield case(dtype, "none", 1, vocab_size, temperature=1, smooth=True)
    for divergence in range(5):
        yield case("fp16", "dense", divergence, 32000, temperature=1)
        yield case("bf16", "dense", divergence, 128256, teacher_dtype="fp32")
        for vocab_size in (8000, 32000, 128256):
            yield case("bf16", "uniform", divergence, vocab_size, k=64, smooth=True)
            yield case("fp32", "prior", divergence, vocab_size, k=256)
        yield case("bf16", "dense", divergence, 128256, parts=True)
        yield case("fp32", "uniform", divergence, 32000, k=64, parts=True)
    yield case("bf16", "drop", 1, 32000, k=64)
    signature = {"gradient": "*bf16", "outer_stride": "i64", "stride": "i64", "scales": "*fp32", "inner": "i32"}
    yield _scale_rows_kernel, signature | {"width": "i32"}, {"BLOCK": 4096}, 4
