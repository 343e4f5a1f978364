"""The specification of kd_loss and linear_kd_loss: plain PyTorch in fp32 or fp64, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen_fast.ops.kd_loss.teachers import LabelPrior, TopK


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Row log-softmax at a temperature; a row of -inf alone has no distribution: it stays -inf and gets no gradient."""
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    log_probs = torch.log_softmax(logits.masked_fill(dead, 0) / temperature, -1)
    return log_probs.masked_fill(dead, -torch.inf)


def teacher_log_probs(
    teacher, labels: Tensor | None, vocab_size: int, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Log-probabilities [N, V] of the teacher at its temperature."""
    if isinstance(teacher, Tensor):
        logits = teacher.reshape(-1, teacher.shape[-1])[:, :vocab_size].to(dtype)
        logits = F.pad(logits, (0, vocab_size - logits.shape[-1]), value=-torch.inf)
    elif isinstance(teacher, LabelPrior):
        table = torch.full((vocab_size, vocab_size), teacher.floor, dtype=dtype, device=teacher.ids.device)
        table.scatter_(1, teacher.ids.long(), teacher.weights.to(dtype).expand(teacher.ids.shape))
        logits = table.log()[labels.clamp(0, vocab_size - 1)]
    else:
        ids, listed = (x.reshape(-1, x.shape[-1]) for x in (teacher.ids.long(), teacher.log_probs.to(dtype)))
        rest = (1 - listed.exp().sum(-1, keepdim=True)).clamp_min(0)
        others = vocab_size - ids.shape[-1]
        fill = (rest / others).log() if teacher.tail == "uniform" and others else torch.full_like(rest, -torch.inf)
        logits = fill.expand(-1, vocab_size).scatter(1, ids, listed)
        if teacher.tail == "drop" and others:  # the rest is an outcome outside the vocabulary
            return log_softmax(torch.cat([logits, rest.log()], -1), temperature)[:, :-1]
    return log_softmax(logits, temperature)


def divergence_per_row(log_q: Tensor, log_p: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """D(q, p) of every row [N] from log-probabilities [N, V]; 0 log 0 is 0."""
    q, p = log_q.exp(), log_p.exp()
    # Where a probability is 0 its logarithm only meets factors of 0: 0 in its place keeps values and gradients finite.
    log_q_at_q, log_p_at_p = log_q.masked_fill(q == 0, 0), log_p.masked_fill(p == 0, 0)
    if divergence == "cross_entropy":
        return -(q * log_p.masked_fill(q == 0, 0)).sum(-1)
    if divergence == "forward_kl":
        return (q * (log_q_at_q - log_p.masked_fill(q == 0, 0))).sum(-1)
    if divergence == "reverse_kl":
        return (p * (log_p_at_p - log_q.masked_fill(p == 0, 0))).sum(-1)
    if divergence == "jsd":
        m = jsd_beta * q + (1 - jsd_beta) * p
        log_m = m.clamp_min(torch.finfo(m.dtype).tiny).log()  # 1 / m must be finite
        return (jsd_beta * q * (log_q_at_q - log_m) + (1 - jsd_beta) * p * (log_p_at_p - log_m)).sum(-1)
    return 0.5 * (q - p).abs().sum(-1)  # tvd


def nll_per_row(student: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Negative log-likelihood [N] of logits [N, V], smoothed and with z-loss. A term with factor 0 is left out, where
    torch gives NaN for 0 * inf."""
    log_p = log_softmax(student, 1.0)
    nll = student.new_zeros(student.shape[0])
    if label_smoothing < 1:
        nll = (1 - label_smoothing) * -log_p.gather(-1, labels.clamp(0, student.shape[-1] - 1)[:, None]).squeeze(-1)
    if label_smoothing > 0:
        nll = nll + label_smoothing * -log_p.mean(-1)
    if z_loss > 0:
        nll = nll + z_loss * log_sum_exp(student) ** 2
    return nll


def log_sum_exp(logits: Tensor) -> Tensor:
    """Row log-sum-exp, -inf and without gradient for a row of -inf alone."""
    dead = (logits == -torch.inf).all(-1)
    return logits.masked_fill(dead[:, None], 0).logsumexp(-1).masked_fill(dead, -torch.inf)


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
) -> Tensor:
    """What ``op.kd_loss`` computes, with [N, V] temporaries and (for a LabelPrior) a V x V table."""
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    vocab_size = student_logits.shape[-1]
    rows_shape = student_logits.shape[:-1]
    student = student_logits.reshape(-1, vocab_size).to(dtype)
    rows = student.shape[0]
    labels = None if labels is None else labels.reshape(-1).long()
    counts = torch.ones(rows, dtype=torch.bool, device=student.device) if labels is None else labels != ignore_index
    row_weights = counts.to(dtype) if weights is None else weights.detach().reshape(-1).to(dtype) * counts
    student = torch.where(row_weights[:, None] == 0, torch.zeros_like(student), student)

    losses = student.new_zeros(rows)
    if alpha < 1:
        nll = nll_per_row(student, labels, label_smoothing, z_loss)
        losses = losses + (1 - alpha) * nll
    if alpha > 0:
        t_temperature = temperature if teacher_temperature is None else teacher_temperature
        log_q = teacher_log_probs(teacher, labels, vocab_size, t_temperature, dtype).detach()
        kd = divergence_per_row(log_q, log_softmax(student, temperature), divergence, jsd_beta)
        losses = losses + alpha * (temperature**2 if scale_by_temperature_squared else 1.0) * kd
    if labels is not None:
        losses = losses.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
    losses = torch.where(row_weights == 0, torch.zeros_like(losses), losses * row_weights)

    if reduction == "none":
        return losses.reshape(rows_shape)
    return losses.sum() / counts.sum().clamp_min(1) if reduction == "mean" else losses.sum()


def kd_loss_rows(student_logits, teacher, labels, coefficient, options) -> tuple[Tensor, Tensor]:
    """Losses [N] times their coefficient [N], and parts [N, 8] as in KDLossParts; ``options`` are KernelOptions."""
    dtype, vocab_size = coefficient.dtype, student_logits.shape[-1]
    counts = coefficient != 0
    student = student_logits.reshape(-1, vocab_size).to(dtype)
    student = torch.where(counts[:, None], student, torch.zeros_like(student))
    log_p = log_softmax(student, options.temperature)
    zeros = student.new_zeros(student.shape[0])

    def entropy(log_probs: Tensor) -> Tensor:
        return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)).sum(-1)

    def chosen(log_probs: Tensor) -> Tensor:
        return log_probs.argmax(-1).masked_fill((log_probs == -torch.inf).all(-1), -1)

    losses, nll, accuracy = zeros, zeros, zeros
    kd, t_log_sum_exp, t_entropy, agreement = zeros, zeros, zeros, zeros
    if labels is not None:
        nll = nll_per_row(student, labels, options.label_smoothing, options.z_loss)
        nll = nll.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
        accuracy = (chosen(log_p) == labels).to(dtype)
        if options.hard > 0:
            losses = losses + options.hard * nll
    if teacher is not None:
        t_temperature = options.teacher_temperature
        log_q = teacher_log_probs(teacher, labels, vocab_size, t_temperature, dtype).detach()
        name = ("cross_entropy", "forward_kl", "reverse_kl", "jsd", "tvd")[options.divergence]
        kd = divergence_per_row(log_q, log_p, name, options.jsd_beta)
        logits = log_q
        if isinstance(teacher, Tensor):
            logits = teacher.detach().reshape(-1, teacher.shape[-1])[:, :vocab_size].to(dtype) / t_temperature
        t_log_sum_exp, t_entropy = log_sum_exp(logits), entropy(log_q)
        agreement = ((chosen(log_p) == chosen(log_q)) & (chosen(log_q) >= 0)).to(dtype)
        if options.soft > 0:
            losses = losses + options.soft * kd
    s_log_sum_exp = log_sum_exp(student / options.temperature)
    columns = (nll, kd, s_log_sum_exp, t_log_sum_exp, entropy(log_p), t_entropy, agreement, accuracy)
    parts = torch.stack([x.detach() for x in columns], -1)
    return torch.where(counts, losses * coefficient, 0), torch.where(counts[:, None], parts, 0)


def linear_kd_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None,  # [..., E]
    teacher_weight: Tensor | None,  # [V', E]
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    **options,
) -> Tensor:
    """What ``linear.linear_kd_loss`` computes, with all logits in memory; ``chunk_rows`` changes nothing here."""

    def logits(hidden, weight, bias):
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    teacher = None
    if teacher_hidden is not None:
        with torch.no_grad():
            teacher = logits(teacher_hidden, teacher_weight, teacher_bias)
    return kd_loss(logits(student_hidden, student_weight, student_bias), teacher, labels, **options)
