"""What greedy, sampling and beam search share: limits, tokens that are never generated, and the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.answer import Answer
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.steps import Steps

# On a GPU the host asks only after so many steps whether every sentence is finished. Greedy search and sampling wait
# for the answer; beam search reads it later (`Unfinished`).
STEPS_BETWEEN_CHECKS = 8
STEPS_IN_PLACE = 2  # of beam search where a whole step is one launch, so that the host runs far ahead of the answer


def target_limits(model: Any, source_lengths: Tensor, max_length: int | None, min_length: int = 0) -> Tensor:
    """Longest target of each sentence [B] int64, eos included: `max_length`, or 2 * source length + 10 (but no less
    than `min_length`) capped by `model.max_positions` where the model has one.
    """
    most = getattr(model, "max_positions", None)
    if max_length is None:
        limits = (2 * source_lengths + 10).clamp(min=min_length)
        return limits if most is None else limits.clamp(max=most)
    if most is not None and max_length > most:
        raise ValueError(f"max_length must be at most model.max_positions = {most}; got {max_length}")
    return torch.full_like(source_lengths, max_length)


def longest_target(model: Any, width: int, max_length: int | None, min_length: int = 0) -> int:
    """The greatest limit of sources of at most `width` tokens, which no device has to be asked for."""
    return int(target_limits(model, torch.tensor([width]), max_length, min_length))


def end_ids(model: Any) -> list[int]:
    """All the ids that end a hypothesis, each once."""
    return list(dict.fromkeys(getattr(model, "eos_ids", None) or [model.eos_id]))


def never_generated(model: Any) -> list[int]:
    """pad and bos, unless the model uses one of them as its eos too."""
    return sorted({model.pad_id, model.bos_id} - {*end_ids(model)})


def is_any(tokens: Tensor, ids: list[int]) -> Tensor:
    """Where `tokens` is one of a few ids; the ids never become a tensor, so nothing is copied to the device."""
    result = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        result |= tokens == token
    return result


def check_due(step: int, device: torch.device) -> bool:
    """Whether the host may ask now if sentences are finished."""
    return device.type == "cpu" or (step + 1) % STEPS_BETWEEN_CHECKS == 0


def may_capture(device: torch.device) -> bool:
    """Whether steps that are made in place are worth a CUDA graph."""
    return device.type == "cuda"


class Unfinished:
    """How many sentences are not finished, as far as the host knows; `finished` [] counts those that are on the device.

    A GPU is not kept waiting: what it is asked after one step is read later, at the latest when it is asked again, so
    that the host is never more than that ahead of it.
    """

    def __init__(self, finished: Tensor, sentences: int) -> None:
        self._finished, self._sentences, self._answer = finished, sentences, Answer()

    def count(self, *, ask: bool) -> int | None:
        """How many are left, or were when the device was asked; None: nothing new is known."""
        if self._finished.device.type != "cuda":
            return self._sentences - int(self._finished) if ask else None
        count = None
        if self._answer.asked and (ask or self._answer.arrived()):
            count = self._sentences - self._answer.read()
        if ask:
            self._answer.ask(self._finished)
        return count


def log_prob_of(logits: Tensor, token: int) -> Tensor:
    """log_softmax(logits)[..., token] in float32; what is NaN or not finite means the same as to `beam_topk`."""
    return (logits[..., token].float() - log_sum(logits)).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def log_sum(logits: Tensor) -> Tensor:
    """logsumexp over the vocabulary, in float32; a NaN logit counts as -inf."""
    logits = logits.float()
    return torch.logsumexp(torch.where(logits.isnan(), -torch.inf, logits), -1)


def generate(
    model: Any,
    source: Tensor,
    source_lengths: Tensor,
    *,
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    n: int,
    max_length: int | None,
    length_penalty: float,
) -> Hypotheses:
    """Extend `n` hypotheses a sentence, each by the one token that `choose` picks, until all have met eos or the limit.

    choose(logits [B, n, V], rows [B], step) -> (tokens [B, n], log_probs [B, n] float32); `rows` are the sentences'
    places in the batch that was given, which shrinks as sentences finish. Where only eos may follow, its pick is
    overruled.
    """
    B, device = source.shape[0], source.device
    limits = target_limits(model, source_lengths, max_length)
    limit_steps = set(limits.tolist())
    longest = max(limit_steps)

    out_tokens = torch.full((B, n, longest), model.pad_id, dtype=torch.int64, device=device)
    out_log_probs = torch.zeros(B, n, longest, device=device)
    out_lengths = torch.zeros(B, n, dtype=torch.int64, device=device)

    rows = torch.arange(B, device=device)
    ends = end_ids(model)
    state = model.start(model.encode(source, source_lengths), n)
    advance = Steps(model, state, longest, device, in_place=may_capture(device))
    tokens = torch.full((B, n), model.bos_id, dtype=torch.int64, device=device)
    done = torch.zeros(B, n, dtype=torch.bool, device=device)
    may_leave = hasattr(model, "select")
    for step in range(longest):
        logits = advance(tokens)
        tokens, log_probs = choose(logits, rows, step)
        if step + 1 in limit_steps:
            at_limit = (limits == step + 1)[:, None]
            tokens = torch.where(at_limit, model.eos_id, tokens)
            of_ends = torch.stack([log_prob_of(logits, token) for token in ends]).amax(0)
            log_probs = torch.where(at_limit, of_ends, log_probs)
        del logits  # before the next are made
        ending = is_any(tokens, ends)
        out_tokens[rows, :, step] = torch.where(done | ending, model.pad_id, tokens)
        out_log_probs[rows, :, step] = torch.where(done, 0.0, log_probs)
        out_lengths[rows] += (~done).long()
        done = done | ending
        tokens = torch.where(done, model.pad_id, tokens)
        if not check_due(step, device):
            continue
        running = ~done.all(1)
        left = int(running.sum())
        if left == 0:
            break
        if may_leave and worth_leaving(left, rows.shape[0], at_most=0.5 if advance.in_place else 0.75):
            kept = running.nonzero()[:, 0]
            advance.select(kept)
            rows, tokens, done, limits = rows[kept], tokens[kept], done[kept], limits[kept]

    width = int(out_lengths.max())
    log_probs = out_log_probs[:, :, :width]
    # in float64, so that the width of the batch does not show in the last bit
    scores = (log_probs.double().sum(2) / out_lengths.double() ** length_penalty).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return Hypotheses(
        tokens=take(out_tokens[:, :, : width - 1], order),
        lengths=take(out_lengths - 1, order),
        scores=take(scores, order),
        token_log_probs=take(log_probs, order),
        iterations=out_lengths.amax(1),
    )


def worth_leaving(left: int, rows: int, *, at_most: float = 0.75) -> bool:
    """Whether so many sentences have finished that moving the others' caches together costs less than keeping them."""
    return left <= at_most * rows


def take(values: Tensor, order: Tensor) -> Tensor:
    """values[b, order[b, i], ...] for values [B, n, ...] and order [B, m]."""
    index = order.reshape(*order.shape, *[1] * (values.dim() - 2)).expand(*order.shape, *values.shape[2:])
    return values.gather(1, index)


def check_lengths(min_length: int, max_length: int | None, length_penalty: float) -> None:
    """Check the options that every left-to-right strategy has."""
    check_number(min_length, "min_length", minimum=0, integer=True)
    if max_length is not None:
        check_number(max_length, "max_length", minimum=1, integer=True)
        if min_length > max_length:
            raise ValueError(f"min_length must be at most max_length = {max_length}; got {min_length}")
    # beyond, length ** length_penalty leaves float32
    check_number(length_penalty, "length_penalty", minimum=-10.0, maximum=10.0)
