"""kd_loss where every process of a group holds a slice of the vocabulary.

What crosses the group is of the size of the rows: their highest logits, then one packed tensor of sums, then for "jsd"
and "tvd" two more sums. Logits, probabilities and gradients stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from condgen_fast._check import check_number, check_tensor
from condgen_fast.ops.kd_loss.checks import DIVERGENCES, KernelOptions, check_options, check_rows, check_teacher
from condgen_fast.ops.kd_loss.op import row_coefficients
from condgen_fast.ops.kd_loss.reference import divergence_per_row
from condgen_fast.ops.kd_loss.teachers import FLOAT_DTYPES, LabelPrior, TopK, check_listed_ids, listed_distribution

CHUNK_LOGITS = 2**20  # logits of a slice that are worked on at a time


def vocabulary_parallel_kd_loss(
    student_logits: Tensor,  # [..., V_r]
    teacher: Tensor | TopK | LabelPrior | None,
    labels: Tensor | None = None,  # [...]
    *,
    vocabulary_start: int,
    vocabulary_size: int,
    group: dist.ProcessGroup | None = None,
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
) -> Tensor:
    """``kd_loss`` of logits whose columns are spread over a group of processes: the same loss on every one of them.

    Every process calls this with the same labels, weights and options; its gradient is that of its own slice. A caller
    whose processes go on with different losses has to reduce them first.

    Args:
        student_logits: [..., V_r], the columns ``vocabulary_start ... vocabulary_start + V_r`` of the student's logits.
        teacher: [..., V_r], the same columns of the teacher's logits; or a TopK or LabelPrior with the ids of the whole
            vocabulary, the same on every process; None at ``alpha = 0``.
        labels: [...] of the whole vocabulary.
        vocabulary_start: first column of this process; the slices of all must make up the vocabulary.
        vocabulary_size: V, the columns of all processes together.
        group: the process group, by default the default one; without one this process holds the whole vocabulary.
        others: as in ``kd_loss``.

    Returns:
        float32 (float64 for float64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: as ``kd_loss``; on the CPU also where the slices do not make up the vocabulary. On a GPU the loss is
            NaN then, and that of a row with a label out of range.

    Memory: O(N) and a few times CHUNK_LOGITS beyond the inputs and the gradient, which is computed in the backward pass
        from the saved sums, without another collective.

    Equivalent to: ``kd_loss`` on the concatenated slices of all processes.
    """
    options = check_options(
        alpha, temperature, teacher_temperature, scale_by_temperature_squared, divergence, jsd_beta, label_smoothing,
        z_loss, ignore_index, reduction, "auto",
    )  # fmt: skip
    width = check_tensor(student_logits, "student_logits", shape="... V", dtypes=FLOAT_DTYPES)["V"]
    if width == 0:
        raise ValueError(f"student_logits must have at least one column; got shape {list(student_logits.shape)}")
    check_number(vocabulary_size, "vocabulary_size", minimum=1, integer=True)
    check_number(vocabulary_start, "vocabulary_start", minimum=0, maximum=vocabulary_size - width, integer=True)
    rows_shape, device = student_logits.shape[:-1], student_logits.device
    check_rows(labels, weights, rows_shape, vocabulary_size, ignore_index, device)
    check_teacher(teacher, labels, alpha, rows_shape, vocabulary_size, device)
    if isinstance(teacher, Tensor) and teacher.shape != student_logits.shape:
        raise ValueError(f"teacher must have shape {list(student_logits.shape)}; got {list(teacher.shape)}")
    if isinstance(teacher, TopK) and device.type == "cpu":
        check_listed_ids(teacher.ids, "teacher.ids", vocabulary_size)
    if alpha == 0:
        teacher = None
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    labels, coefficient = row_coefficients(labels, weights, ignore_index, reduction, student_logits, dtype)
    logits, listed = None, None
    if isinstance(teacher, Tensor):
        logits = teacher.detach().reshape(rows_shape.numel(), width)
    elif teacher is not None:
        listed = listed_distribution(teacher, labels, vocabulary_size, options.teacher_temperature, dtype)
    student = student_logits.reshape(rows_shape.numel(), width)
    losses = _Loss.apply(
        student, logits, listed, labels, coefficient, options, vocabulary_start,
        vocabulary_size, group,
    )  # fmt: skip
    if reduction == "none":
        return losses.view(rows_shape)
    return losses.sum(dtype=torch.float64).to(dtype)


class _Sums(NamedTuple):
    """Of every row [N], over the whole vocabulary; x = s - shift, z = x / T, y the teacher's logarithm."""

    s: Tensor  # sum of exp(z)
    hard: Tensor  # of exp(x)
    x: Tensor  # of finite x
    gone: Tensor  # number of -inf
    t: Tensor  # sum of exp(y)
    dot: Tensor  # what the divergence needs
    gold: Tensor  # x of the label
    owners: Tensor  # processes that have the label
    columns: Tensor  # of all processes


class _Slice:
    """The columns of one process, a few rows at a time."""

    def __init__(self, student, teacher, listed, start, dtype):
        self.student, self.teacher, self.listed, self.start, self.dtype = student, teacher, listed, start, dtype
        self.width = student.shape[1]

    def chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK_LOGITS // self.width)
        return (slice(first, first + step) for first in range(0, self.student.shape[0], step))

    def highest(self, logits: Tensor) -> Tensor:
        return logits.amax(-1).to(self.dtype)

    def x(self, rows: slice, shift: Tensor) -> Tensor:
        return self.student[rows].to(self.dtype) - shift[rows, None]

    def log_teacher(self, rows: slice, shift: Tensor, temperature: float) -> Tensor:
        """Logarithms of the tempered teacher: unnormalised ones of logits, the right ones of what is listed."""
        if self.teacher is not None:
            return (self.teacher[rows].to(self.dtype) - shift[rows, None]) / temperature
        ids, listed, floor = (value[rows] for value in self.listed)
        # One column more, for the tokens of other processes
        log_q = floor.log()[:, None].expand(-1, self.width + 1).contiguous()
        place = ids - self.start
        place = torch.where((place < 0) | (place >= self.width), self.width, place)
        return log_q.scatter_(1, place, listed.log())[:, : self.width]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, listed, labels, coefficient, options, start, vocabulary_size, group):
        part = _Slice(student, teacher, listed, start, coefficient.dtype)
        soft = teacher is not None or listed is not None
        divergence = DIVERGENCES[options.divergence] if soft else ""

        highest = [part.highest(student)] + ([part.highest(teacher)] if teacher is not None else [])
        shifts = [
            top.masked_fill(top == -math.inf, 0) for top in _reduced(torch.stack(highest), dist.ReduceOp.MAX, group)
        ]
        s_shift, t_shift = shifts[0], shifts[-1]
        packed = torch.stack([x for _, x in _partial_sums(part, s_shift, t_shift, labels, options, divergence)])
        sums = _Sums(*_reduced(packed, dist.ReduceOp.SUM, group))
        if student.device.type == "cpu" and len(coefficient) and int(sums.columns[0]) != vocabulary_size:
            raise ValueError(
                f"the slices of all processes must make up the vocabulary of {vocabulary_size};"
                f" they have {int(sums.columns[0])} columns"
            )

        dead = sums.s == 0
        s_log = sums.s.log().masked_fill(dead, 0)
        hard_log = sums.hard.log().masked_fill(dead, 0)
        t_log = sums.t.log().masked_fill(sums.t == 0, 0) if teacher is not None else torch.zeros_like(s_log)
        mass = torch.where(sums.t == 0, 0, sums.t * (-t_log).exp()) if soft else torch.zeros_like(s_log)
        loss, ratio = torch.zeros_like(coefficient), torch.zeros_like(coefficient)
        stats = (s_shift, t_shift, s_log, t_log)
        if soft:
            value, ratio = _divergence(part, sums, stats, mass, dead, divergence, options, group)
            loss = loss + options.soft * value
        lse = s_shift + hard_log
        if options.hard > 0:
            loss = loss + options.hard * _likelihood(sums, hard_log, lse, dead, options, vocabulary_size)
        wrong = sums.columns != vocabulary_size
        if labels is not None:
            wrong = wrong | (sums.owners != 1)
        loss = loss.masked_fill(wrong, math.nan)
        ctx.save_for_backward(student, teacher, labels, coefficient, *stats, hard_log, lse, mass, ratio, dead, wrong)
        ctx.listed, ctx.options, ctx.divergence, ctx.start = listed, options, divergence, start
        ctx.vocabulary_size = vocabulary_size
        return torch.where(coefficient == 0, 0, coefficient * loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        (
            student,
            teacher,
            labels,
            coefficient,
            s_shift,
            t_shift,
            s_log,
            t_log,
            hard_log,
            lse,
            mass,
            ratio,
            dead,
            wrong,
        ) = ctx.saved_tensors
        options, divergence, dtype = ctx.options, ctx.divergence, coefficient.dtype
        part = _Slice(student, teacher, ctx.listed, ctx.start, dtype)
        scale = (coefficient * grad_losses).masked_fill(dead, 0).masked_fill(wrong, math.nan)
        scale = torch.where(coefficient == 0, 0, scale)
        hard_scale = scale * options.hard * torch.where(dead, 1, 1 + 2 * options.z_loss * lse)
        gradient = torch.empty_like(student)
        for rows in part.chunks():
            x = part.x(rows, s_shift)
            log_p = x / options.temperature - s_log[rows, None]
            g = torch.zeros_like(x)
            if divergence:
                log_q = part.log_teacher(rows, t_shift, options.teacher_temperature) - t_log[rows, None]
                p, q = log_p.exp(), log_q.exp()
                if divergence in ("cross_entropy", "forward_kl"):
                    g = p * mass[rows, None] - q
                else:
                    g = p * (_derivative(log_p, p, log_q, q, divergence, options.jsd_beta) - ratio[rows, None])
                g = g * (scale[rows, None] * (options.soft / options.temperature))
            if options.hard > 0:
                g = g + hard_scale[rows, None] * (x - hard_log[rows, None]).exp()
                at_label = scale[rows] * options.hard
                g = g - (at_label * options.label_smoothing / ctx.vocabulary_size)[:, None]
                place = labels[rows] - ctx.start
                mine = (place >= 0) & (place < part.width)
                taken = (at_label * (1 - options.label_smoothing)).masked_fill(~mine, 0)
                g.scatter_add_(1, place.clamp(0, part.width - 1)[:, None], -taken[:, None])
            gradient[rows] = g.masked_fill(scale[rows, None] == 0, 0).to(student.dtype)
        return gradient, *[None] * 8


def _reduced(value: Tensor, operation, group) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation, group)
    return value


def _partial_sums(part: _Slice, s_shift, t_shift, labels, options: KernelOptions, divergence: str):
    """The fields of _Sums over the columns of this process, by name."""
    sums = {name: torch.zeros_like(s_shift) for name in _Sums._fields}
    sums["columns"] += part.width
    for rows in part.chunks():
        x = part.x(rows, s_shift)
        z = x / options.temperature
        e = z.exp()
        sums["s"][rows] = e.sum(-1)
        if options.hard > 0:
            sums["hard"][rows] = e.sum(-1) if options.temperature == 1 else x.exp().sum(-1)
        if options.hard > 0 and options.label_smoothing > 0:
            gone = x == -math.inf
            sums["gone"][rows] = gone.sum(-1).to(part.dtype)
            sums["x"][rows] = x.masked_fill(gone, 0).sum(-1)
        if labels is not None:
            place = labels[rows] - part.start
            mine = (place >= 0) & (place < part.width)
            sums["owners"][rows] = mine.to(part.dtype)
            gold = x.gather(1, place.clamp(0, part.width - 1)[:, None]).squeeze(1)
            sums["gold"][rows] = torch.where(mine, gold, 0)
        if divergence:
            y = part.log_teacher(rows, t_shift, options.teacher_temperature)
            q = y.exp()
            sums["t"][rows] = q.sum(-1)
            if divergence == "cross_entropy":
                sums["dot"][rows] = torch.where(q == 0, 0, q * z).sum(-1)
            elif divergence == "forward_kl":
                sums["dot"][rows] = torch.where(q == 0, 0, q * (y - z)).sum(-1)
            elif divergence == "reverse_kl":
                sums["dot"][rows] = torch.where(e == 0, 0, e * (z - y)).sum(-1)
    return sums.items()


def _divergence(part: _Slice, sums: _Sums, stats, mass, dead, divergence: str, options: KernelOptions, group):
    """The divergence of every row, and the sum of p times its derivative with respect to p."""
    s_shift, t_shift, s_log, t_log = stats
    nothing = torch.zeros_like(s_log)
    if divergence in ("cross_entropy", "forward_kl"):
        dot = sums.dot * (-t_log).exp()
        value = mass * s_log - dot if divergence == "cross_entropy" else dot + mass * (s_log - t_log)
        return torch.where(dead, torch.where(mass == 0, nothing, math.inf), value), nothing
    if divergence == "reverse_kl":
        value = torch.where(dead, nothing, sums.dot / sums.s - s_log + t_log)
        return value, value
    packed = torch.zeros(2, len(s_log), dtype=part.dtype, device=s_log.device)
    for rows in part.chunks():
        log_p = part.x(rows, s_shift) / options.temperature - s_log[rows, None]
        log_q = part.log_teacher(rows, t_shift, options.teacher_temperature) - t_log[rows, None]
        p = log_p.exp()
        packed[0, rows] = divergence_per_row(log_q, log_p, divergence, options.jsd_beta)
        packed[1, rows] = (p * _derivative(log_p, p, log_q, log_q.exp(), divergence, options.jsd_beta)).sum(-1)
    value, ratio = _reduced(packed, dist.ReduceOp.SUM, group)
    return value, ratio


def _derivative(log_p, p, log_q, q, divergence: str, beta: float) -> Tensor:
    """Of the divergence with respect to p, up to a constant."""
    if divergence == "reverse_kl":
        return torch.where(p == 0, 0, log_p - log_q)
    if divergence == "jsd":
        m = (beta * q + (1 - beta) * p).clamp_min(torch.finfo(p.dtype).tiny)  # 0 where p is the least of numbers
        return torch.where(p == 0, 0, (1 - beta) * (log_p - m.log()))
    return 0.5 * (p - q).sign()


def _likelihood(sums: _Sums, hard_log, lse, dead, options: KernelOptions, vocabulary_size: int) -> Tensor:
    """The smoothed negative log-likelihood of every row, with its z-loss; a term of factor 0 is left out."""
    value = torch.zeros_like(hard_log)
    if options.label_smoothing < 1:
        value = (1 - options.label_smoothing) * (hard_log - sums.gold)
    if options.label_smoothing > 0:
        even = torch.where(sums.gone > 0, math.inf, hard_log - sums.x / vocabulary_size)
        value = value + options.label_smoothing * even
    if options.z_loss > 0:
        value = value + options.z_loss * lse**2
    return torch.where(dead, math.inf, value)
