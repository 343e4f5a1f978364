"""Levenshtein refinement (Gu et al. 2019): delete, insert placeholders, fill them, until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.canvas import (
    between,
    hypotheses,
    initial_canvas,
    mean_log_prob,
    penalise_nothing,
    predict,
    true_positions,
)
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import EditModel
from condgen_fast.decode.trace import Recorder
from condgen_fast.ops.levenshtein import apply_edits
from condgen_fast.ops.refinement import row_stats


@dataclass
class _Sentences:
    """The R sentences that are still being refined; canvases are [R, W]."""

    memory: Any
    rows: Tensor  # int64 [R], their places in the batch
    bounds: Tensor  # int64 [R], the longest canvas each may get by insertions
    lengths: Tensor  # int64 [R], of the canvas, bos and eos counted
    tokens: Tensor
    log_probs: Tensor
    before: Tensor  # the canvas that the running iteration began with, and its log-probabilities
    before_log_probs: Tensor
    earlier: Tensor  # the canvas that the iteration before it began with
    settled: Tensor  # bool [R], the last iteration ended where it began

    def select(self, model: EditModel, index: Tensor) -> _Sentences:
        values = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "memory"}
        return _Sentences(model.select(self.memory, index), **values)

    def inside(self) -> Tensor:
        return between(self.lengths - 2, self.tokens.shape[1])

    def trim(self, width: int) -> None:
        self.tokens, self.log_probs = self.tokens[:, :width].contiguous(), self.log_probs[:, :width].contiguous()


@dataclass(frozen=True)
class LevenshteinRefinement:
    """Decoding of an `EditModel` from an empty canvas or from given tokens.

    One iteration deletes the tokens whose deletion is more probable than not, inserts as many placeholders into each
    slot as is most probable, and fills them with the most probable tokens. A sentence is finished when an iteration
    leaves it as it was; that confirming iteration counts in `Hypotheses.iterations`. At `max_iterations` the canvas is
    returned as it stands, except where it has just swung back to what it was two iterations before: of these two
    canvases the one of higher mean log-probability is returned (ties: the later; an empty one never before another).

    bos and eos are never deleted; bos, eos, pad and mask are never predicted and never returned. A row stays within
    `max_length` in total: the placeholders furthest right give way first. `Hypotheses.scores` are mean
    log-probabilities of the tokens (0 for an empty output), each from the iteration that wrote the token; given tokens
    that stayed have log-probability 0, as has eos.

    Source: "Levenshtein Transformer", arXiv:1905.11006, section 3. The published code bounds each slot instead of the
    total, averages over bos and eos too, and runs one iteration more than its maximum.
    """

    model_protocol: ClassVar[type] = EditModel

    # Iterations a sentence gets at most, the confirming one included.
    max_iterations: int = 9
    # Subtracted from the logit of "insert nothing"; more makes outputs longer. The paper searches [0, 3].
    eos_penalty: float = 0.0
    # Tokens to start from (post-editing): a list of ids per sentence or int64 [B, L] right-padded; no bos, eos, mask.
    initial: Tensor | Sequence[Sequence[int]] | None = field(default=None, compare=False)
    # Longest output, eos counted; None: max(10, 2·S) for S source tokens. Never more than the model's positions hold.
    # A longer `initial` is not cut, but takes insertions only once deletions have brought it below.
    max_length: int | None = None
    # Record every step in `Hypotheses.trace`; costs a copy to the host per step.
    trace: bool = False

    def __post_init__(self) -> None:
        check_number(self.max_iterations, "max_iterations", minimum=1, integer=True)
        check_number(self.eos_penalty, "eos_penalty", minimum=0.0)
        if self.max_length is not None:
            check_number(self.max_length, "max_length", minimum=1, integer=True)

    def run(self, model: EditModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; one synchronisation an iteration."""
        batch, device = source.shape[0], source.device
        now = self._start(model, source, source_lengths)
        width = max([now.tokens.shape[1], *now.bounds.tolist()])
        recorder = Recorder(model, batch) if self.trace else None
        active, iterations = list(range(batch)), [self.max_iterations] * batch
        final_tokens = torch.full((batch, width), model.pad_id, device=device)
        final_log_probs = torch.zeros(batch, width, device=device)
        if recorder and self.initial is not None:
            recorder.record(0, "start", active, now.tokens, now.log_probs, now.inside())

        for iteration in range(1, self.max_iterations + 1):
            idle, placeholders = self._delete_and_insert(model, now, width, recorder, iteration, active)
            state = torch.stack([idle.long(), now.settled.long(), now.lengths, placeholders])
            host_idle, host_settled, lengths, counts = state.tolist()  # the synchronisation
            if any(host_idle):
                final_tokens[now.rows], final_log_probs[now.rows] = now.tokens, now.log_probs
                kept = []
                for i, row in enumerate(active):
                    if host_idle[i]:
                        iterations[row] = iteration - host_settled[i]  # it was over one iteration ago
                    else:
                        kept.append(i)
                if not kept:
                    break
                active, lengths = [active[i] for i in kept], [lengths[i] for i in kept]
                now = now.select(model, true_positions(~idle, len(kept)))
            now.trim(max(lengths))
            if sum(counts):
                self._fill(model, now, sum(counts), recorder, iteration, active)
            now.settled = _same(now.tokens, now.before, model.pad_id)
        else:
            self._end_cycles(model, now, recorder, active)
            # Whole rows: what was noted of them when another sentence left may have been longer.
            final_tokens[now.rows] = _widen(now.tokens, width, model.pad_id)
            final_log_probs[now.rows] = _widen(now.log_probs, width, 0.0)

        lengths = (final_tokens != model.pad_id).sum(1) - 2
        scores = mean_log_prob(final_log_probs, between(lengths, width))
        return hypotheses(
            model,
            final_tokens[:, None],
            final_log_probs[:, None],
            lengths[:, None],
            scores[:, None],
            torch.tensor(iterations, device=device),
            recorder.traces(list(range(batch)), iterations) if recorder else None,
        )

    def _start(self, model: EditModel, source: Tensor, source_lengths: Tensor) -> _Sentences:
        batch, device = source.shape[0], source.device
        tokens, lengths = initial_canvas(self.initial, model, batch, device)
        longest = getattr(model, "max_positions", None)
        if self.max_length is None:
            bounds = (2 * source_lengths).clamp(min=10) + 1  # bos
        else:
            bounds = torch.full_like(source_lengths, self.max_length + 1)
        if longest is not None:
            bounds = bounds.clamp(max=longest)
        log_probs = torch.zeros(tokens.shape, device=device)
        none_yet = torch.full_like(tokens, model.pad_id)  # equal to no canvas
        return _Sentences(
            memory=model.encode(source, source_lengths),
            rows=torch.arange(batch, device=device),
            bounds=bounds,
            lengths=lengths,
            tokens=tokens,
            log_probs=log_probs,
            before=none_yet,
            before_log_probs=log_probs,
            earlier=none_yet,
            settled=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def _delete_and_insert(
        self,
        model: EditModel,
        now: _Sentences,
        width: int,
        recorder: Recorder | None,
        iteration: int,
        active: list[int],
    ) -> tuple[Tensor, Tensor]:
        """The first two policies -> bool [R], rows that neither touched, and int64 [R], placeholders inserted."""
        ids = {name: getattr(model, name) for name in ("pad_id", "bos_id", "eos_id", "mask_id")}
        now.earlier, now.before, now.before_log_probs = now.before, now.tokens, now.log_probs
        begun, states = now.lengths, None
        if now.tokens.shape[1] > 2:
            if getattr(model, "shares_edit_states", False):
                states = model.edit_states(now.tokens, now.memory)
                logits = model.delete_head(states)
            else:
                logits = model.delete_logits(now.tokens, now.memory)
            delete = (logits[..., 1] > logits[..., 0]) & now.inside() & ~now.settled[:, None]
            if recorder:
                recorder.record(iteration, "delete", active, now.tokens, now.log_probs, delete)
            edited = apply_edits(now.tokens, delete=delete, scores=now.log_probs, **ids)
            now.tokens, now.log_probs, now.lengths = edited.tokens, edited.scores, edited.lengths
            if states is not None:
                states = self._states_after_deletions(model, now, states, delete.any(1))
        kept = now.lengths

        logits = model.insert_logits(now.tokens, now.memory) if states is None else model.insert_head(states)
        insert = row_stats(penalise_nothing(logits, self.eos_penalty)).token * ~now.settled[:, None]
        room = (now.bounds - kept).clamp(min=0)[:, None]
        insert = torch.minimum(insert, (room - insert.cumsum(1) + insert).clamp(min=0))
        edited = apply_edits(now.tokens, insert=insert, scores=now.log_probs, max_length=width, **ids)
        now.tokens, now.log_probs, now.lengths = edited.tokens, edited.scores, edited.lengths
        return (now.lengths == kept) & (kept == begun), now.lengths - kept

    @staticmethod
    def _states_after_deletions(model: EditModel, now: _Sentences, states: Tensor, edited: Tensor) -> Tensor:
        """Of states [R, W, D] of the canvases before the deletions, those of the edited rows [R] computed anew."""
        if edited.device.type != "cpu":  # there it costs more to know which than to compute them all
            return model.edit_states(now.tokens, now.memory)
        index = edited.nonzero().squeeze(1)
        if len(index) == 0:
            return states
        if len(index) == len(edited):
            return model.edit_states(now.tokens, now.memory)
        fresh = model.edit_states(now.tokens[index], model.select(now.memory, index))
        return states.index_copy(0, index, fresh)

    def _fill(
        self,
        model: EditModel,
        now: _Sentences,
        masks: int,
        recorder: Recorder | None,
        iteration: int,
        active: list[int],
    ) -> None:
        masked = now.tokens == model.mask_id
        if recorder:
            recorder.record(iteration, "insert", active, now.tokens, now.log_probs, masked)
        where = true_positions(masked, masks)
        token, log_prob = predict(model, now.tokens, now.memory, where)
        now.tokens.view(-1)[where], now.log_probs.view(-1)[where] = token, log_prob
        if recorder:
            recorder.record(iteration, "fill", active, now.tokens, now.log_probs, masked)

    def _end_cycles(self, model: EditModel, now: _Sentences, recorder: Recorder | None, active: list[int]) -> None:
        """Put back the canvas before the last iteration where the two alternate and it is the better one."""
        width = max(now.tokens.shape[1], now.before.shape[1])
        tokens, before = (_widen(value, width, model.pad_id) for value in (now.tokens, now.before))
        log_probs, before_log_probs = (_widen(value, width, 0.0) for value in (now.log_probs, now.before_log_probs))
        swung = _same(tokens, now.earlier, model.pad_id) & ~now.settled
        restored = swung & (self._quality(model, before, before_log_probs) > self._quality(model, tokens, log_probs))
        now.tokens = torch.where(restored[:, None], before, tokens)
        now.log_probs = torch.where(restored[:, None], before_log_probs, log_probs)
        if recorder:
            touched = restored[:, None] & (now.tokens != model.pad_id)
            recorder.record(self.max_iterations, "restore", active, now.tokens, now.log_probs, touched)

    def _quality(self, model: EditModel, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """float32 [R]: mean log-probability of the tokens, -inf where there are none."""
        inside = between((tokens != model.pad_id).sum(1) - 2, tokens.shape[1])
        return mean_log_prob(log_probs, inside).masked_fill(~inside.any(1), -torch.inf)


def _widen(value: Tensor, width: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=filler)


def _same(a: Tensor, b: Tensor, pad_id: int) -> Tensor:
    """bool [R]: which rows of two canvases, padded to any width, hold the same tokens."""
    width = max(a.shape[1], b.shape[1])
    return (_widen(a, width, pad_id) == _widen(b, width, pad_id)).all(1)
