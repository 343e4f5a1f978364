"""What strategies on a canvas (bos … eos, padded on the right) have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from condgen_fast._check import check_token_ids
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import EditModel, FillModel
from condgen_fast.decode.trace import Trace
from condgen_fast.ops.refinement import row_stats

# Rows of the vocabulary projection that exist at once; bounds memory where batch times length is large.
PROJECTED_ROWS = 4096


def between(lengths: Tensor, width: int) -> Tensor:
    """bool [B, width]: the positions between bos and eos of canvases [B, width] with `lengths` [B] tokens inside."""
    position = torch.arange(width, device=lengths.device)
    return (position > 0) & (position <= lengths[:, None])


def initial_canvas(
    initial: Tensor | Sequence[Sequence[int]] | None, model: FillModel | EditModel, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Canvases int64 [B, W] of given tokens between bos and eos, and their lengths [B], bos and eos counted.

    initial: int64 [B, L] padded on the right, or a list of ids per sentence, without bos, eos and mask; None: nothing.
    Raises TypeError for another type, ValueError for what cannot stand there or does not fit the model's positions.
    """
    if initial is None:
        tokens = torch.full((batch, 2), model.bos_id, device=device)
        tokens[:, 1].fill_(model.eos_id)
        return tokens, torch.full((batch,), 2, device=device)
    if isinstance(initial, Tensor):
        given = initial
    else:
        if not _is_sequence(initial) or not all(_is_sequence(row) and _are_ids(row) for row in initial):
            raise TypeError(f"initial must be a Tensor [B, L] or a list of lists of ids; got {initial!r:.60}")
        width = max(map(len, initial), default=0)
        rows = [[*row, *[model.pad_id] * (width - len(row))] for row in initial]
        given = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
    check_token_ids(given, "initial", shape="B L", vocab_size=model.vocab_size)
    if given.shape[0] != batch:
        raise ValueError(f"initial must hold tokens for each of the {batch} sentences; got {given.shape[0]}")
    given = given.to(device=device, dtype=torch.int64)
    real = given != model.pad_id
    wrong = (given == model.bos_id) | (given == model.eos_id) | (given == model.mask_id)
    wrong[:, 1:] |= real[:, 1:] & ~real[:, :-1]
    if bool(wrong.any()):
        raise ValueError("initial must hold no bos, eos or mask, and padding only on the right; got one")
    widest = int(real.sum(1).max()) if given.numel() else 0
    longest = getattr(model, "max_positions", None)
    if longest is not None and widest + 2 > longest:
        raise ValueError(f"initial must fit the model's {longest} positions with bos and eos; got {widest} tokens")
    lengths = real.sum(1) + 2
    tokens = torch.nn.functional.pad(given[:, :widest], (1, 1), value=model.pad_id)
    tokens[:, 0] = model.bos_id
    return tokens.scatter_(1, lengths[:, None] - 1, model.eos_id), lengths


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_ids(row: Sequence[Any]) -> bool:
    return all(isinstance(token, Integral) for token in row)


def predict(
    model: FillModel | EditModel, tokens: Tensor, memory: object, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The most probable token at each of `positions`, and its natural log-probability.

    tokens: int64 [B, L]; positions: int64 [N], indices into the flattened canvas, or None: all B * L of them. Returns
    int64 [N] and float32 [N].
    bos, eos, pad and mask are never predicted: their probability is shared out among the other tokens (unk is one of
    these). Where a model leaves no other token any probability, the lowest ordinary id comes with log-probability -inf.
    A model that offers `fill_states` has only `positions` projected to the vocabulary; of any other model all of
    `fill(tokens, memory)` is computed and the rest left unread.

    Equivalent to: ``logits = model.fill(tokens, memory).flatten(0, 1)[positions]``, then
    ``logits.index_fill(1, specials, -inf).log_softmax(1).max(1)``.
    """
    if hasattr(model, "fill_states"):
        states, project = model.fill_states(tokens, memory).flatten(0, 1), model.project
    else:
        states, project = model.fill(tokens, memory).flatten(0, 1), None
    specials = {model.bos_id, model.eos_id, model.pad_id, model.mask_id}
    fallback = next(i for i in range(len(specials) + 1) if i not in specials)
    written, log_probs = [], []
    for logits in projected(states, project, positions):
        for first, end in runs(specials):
            logits[:, first:end].fill_(-torch.inf)
        stats = row_stats(logits)
        # of a row that leaves nothing, row_stats says token 0, and of no other one below the first that is not special
        written.append(stats.token.clamp(min=fallback))
        log_probs.append(stats.log_prob)
    return (written[0], log_probs[0]) if len(written) == 1 else (torch.cat(written), torch.cat(log_probs))


def projected(states: Tensor, project: Callable[[Tensor], Tensor] | None, positions: Tensor | None) -> Iterator[Tensor]:
    """Logits [n, V] to write to, of `positions` of states [N, D] or of all (None), PROJECTED_ROWS of them at a time.

    project: None where the states are logits already.
    """
    for some in (states if positions is None else positions).split(PROJECTED_ROWS):
        if positions is not None:
            some = states.index_select(0, some)
        logits = some if project is None else project(some)
        yield logits.clone() if positions is None and _same_memory(logits, some) else logits


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether these are views of one tensor, or one."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Ids as ranges (first, end): a slice of logits for each is written by one kernel, and nothing goes to a device."""
    found: list[tuple[int, int]] = []
    for token in sorted(set(ids)):
        if found and found[-1][1] == token:
            found[-1] = (found[-1][0], token + 1)
        else:
            found.append((token, token + 1))
    return found


def fill(
    model: FillModel | EditModel, tokens: Tensor, log_probs: Tensor, memory: object, masked: Tensor, count: int | None
) -> None:
    """Write what `predict` says over the `masked` positions of canvases [B, L] and into their log_probs, in place.

    count: how many are masked, so that only these are projected; None: unknown to the host, so all are.
    """
    where = None if count is None else true_positions(masked, count)
    token, log_prob = predict(model, tokens, memory, where)
    if where is None:
        torch.where(masked, token.view(masked.shape), tokens, out=tokens)
        torch.where(masked, log_prob.view(masked.shape), log_probs, out=log_probs)
    else:
        tokens.view(-1).index_copy_(0, where, token)
        log_probs.view(-1).index_copy_(0, where, log_prob)


def penalise_nothing(logits: Tensor, penalty: float) -> Tensor:
    """logits [..., n] of inserting 0, 1, … masks, `penalty` taken from that of 0."""
    if penalty == 0:
        return logits
    logits = logits.clone()
    logits[..., 0] -= penalty
    return logits


def true_positions(flags: Tensor, count: int) -> Tensor:
    """Flat indices [count] of the true elements of `flags`, whose number the caller knows: no synchronisation."""
    return torch.nonzero_static(flags.flatten(), size=count).squeeze(1)


def mean_log_prob(log_probs: Tensor, counted: Tensor) -> Tensor:
    """float32 [B]: mean of `log_probs` [B, L] where `counted` [B, L] is true, 0 where nothing is.

    Summed in float64, so that the width of the canvas does not show in the result.
    """
    total = log_probs.double().masked_fill(~counted, 0.0).sum(1)
    return (total / counted.sum(1).clamp(min=1)).float()


def best_first(scores: Tensor, exists: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` highest of scores [B, K] and where they stand [B, n], ties from left to right.

    What does not exist comes last, with -inf, behind what has a score of -inf itself.
    """
    order = (-scores).masked_fill(~exists, torch.nan).argsort(dim=1, stable=True)[:, :n]  # NaN comes last
    return scores.masked_fill(~exists, -torch.inf).gather(1, order), order


def hypotheses(
    model: FillModel | EditModel,
    tokens: Tensor,
    log_probs: Tensor,
    lengths: Tensor,
    scores: Tensor,
    iterations: Tensor,
    trace: list[Trace] | None,
) -> Hypotheses:
    """The result from canvases and their log_probs [B, n, W]; `lengths` [B, n] counts neither bos nor eos."""
    inside = torch.arange(tokens.shape[2] - 1, device=tokens.device) < lengths[..., None]
    longest = int(lengths.max()) if lengths.numel() else 0
    return Hypotheses(
        tokens=torch.where(inside, tokens[..., 1:], model.pad_id)[..., :longest],
        lengths=lengths,
        scores=scores,
        token_log_probs=torch.where(inside, log_probs[..., 1:], 0.0)[..., : longest + 1],
        iterations=iterations,
        trace=trace,
    )
