"""Levenshtein refinement (Gu et al. 2019): delete, insert placeholders, fill them, until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.canvas import between, fill, hypotheses, initial_canvas, mean_log_prob
from condgen_fast.decode.edits import Results, Sentences, delete, deletions, end_cycles, insert
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import EditModel
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import Running, host_follows, on_device, repeated, worth_capturing_anew


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
    # A longer `initial` is not cut, but takes insertions only once deletions have brought it below. On a GPU every
    # canvas is as wide as the longest may get.
    max_length: int | None = None
    # Record every step in `Hypotheses.trace`; costs a copy to the host per step.
    trace: bool = False

    def __post_init__(self) -> None:
        check_number(self.max_iterations, "max_iterations", minimum=1, integer=True)
        check_number(self.eos_penalty, "eos_penalty", minimum=0.0)
        if self.max_length is not None:
            check_number(self.max_length, "max_length", minimum=1, integer=True)

    def run(self, model: EditModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; on a GPU the device never runs dry between iterations."""
        batch, device = source.shape[0], source.device
        tokens, lengths = initial_canvas(self.initial, model, batch, device)
        bounds = self._bounds(model, source_lengths)
        width = max([tokens.shape[1], *bounds.tolist()])
        now = Sentences.start(model.encode(source, source_lengths), tokens, bounds, model.pad_id)
        recorder = Recorder(model, batch) if self.trace else None
        if recorder or host_follows(device):
            results = self._refine(model, now, lengths.tolist(), width, recorder)
        else:
            results = self._refine_unattended(model, now, width)
        lengths = (results.tokens != model.pad_id).sum(1) - 2
        scores = mean_log_prob(results.log_probs, between(lengths, results.tokens.shape[1]))
        return hypotheses(
            model,
            results.tokens[:, None],
            results.log_probs[:, None],
            lengths[:, None],
            scores[:, None],
            results.iterations,
            recorder.traces(results.iterations, results.tokens, results.log_probs) if recorder else None,
        )

    def _bounds(self, model: EditModel, source_lengths: Tensor) -> Tensor:
        """int64 [B]: the longest canvas each may get by insertions, bos and eos counted."""
        longest = getattr(model, "max_positions", None)
        if self.max_length is None:
            bounds = (2 * source_lengths).clamp(min=10) + 1
        else:
            bounds = torch.full_like(source_lengths, self.max_length + 1)
        return bounds if longest is None else bounds.clamp(max=longest)

    def _refine(
        self, model: EditModel, now: Sentences, lengths: list[int], width: int, recorder: Recorder | None
    ) -> Results:
        """The loop in which the host looks at every step: canvases are as wide as the longest, and those that an
        iteration left as they were leave at once."""
        results, active, states = Results(len(lengths), width, model.pad_id), list(range(len(lengths))), None
        if recorder and self.initial is not None:
            recorder.record(0, "start", active, now.tokens, now.log_probs, now.inside(model))
        for iteration in range(1, self.max_iterations + 1):
            now.earlier, now.before, now.before_log_probs = now.before, now.tokens, now.log_probs
            begun = kept = lengths
            if now.tokens.shape[1] > 2:
                flags, states = deletions(model, now.tokens, now.memory, states)
                if recorder:
                    touched = flags & now.inside(model)
                    recorder.record(iteration, "delete", active, now.tokens, now.log_probs, touched)
                edits = delete(model, now.tokens, now.log_probs, flags)
                now.tokens, now.log_probs, kept = edits.tokens, edits.scores, edits.lengths.tolist()
                if states is not None and kept != begun:
                    edited = [i for i, length in enumerate(kept) if length != begun[i]]
                    states = _renewed(model, now, states, edited)
            bounds, penalty = now.bounds, self.eos_penalty
            edits = insert(model, now.tokens, now.log_probs, now.memory, states, penalty, bounds, width)
            now.tokens, now.log_probs, lengths = edits.tokens, edits.scores, edits.lengths.tolist()
            masks = sum(lengths) - sum(kept)

            left = [i for i in range(len(active)) if kept[i] != begun[i] or lengths[i] != kept[i]]
            if len(left) < len(active):
                results.put(now, iteration)
                if not left:
                    return results
                now, states, (active, begun, lengths) = _select(model, now, states, left, active, begun, lengths)
            now.trim(max(lengths))
            states = None if masks or states is None else states[:, : max(lengths)]
            if not masks:
                continue
            masked = now.tokens == model.mask_id
            if recorder:
                recorder.record(iteration, "insert", active, now.tokens, now.log_probs, masked)
            fill(model, now.tokens, now.log_probs, now.memory, masked, masks)
            if recorder:
                recorder.record(iteration, "fill", active, now.tokens, now.log_probs, masked)
            if begun == lengths or any(map(int.__eq__, begun, lengths)):
                same = now.same_as_before()
                left = [i for i in range(len(active)) if not (same[i] and begun[i] == lengths[i])]
                if len(left) < len(active):
                    results.put(now, iteration)
                    if not left:
                        return results
                    now, states, (active, lengths) = _select(model, now, states, left, active, lengths)
        now.widen(width, model.pad_id)
        restored = end_cycles(model, now)
        if recorder:
            touched = restored[:, None] & (now.tokens != model.pad_id)
            recorder.record(self.max_iterations, "restore", active, now.tokens, now.log_probs, touched)
        results.put(now, self.max_iterations)
        return results

    def _refine_unattended(self, model: EditModel, now: Sentences, width: int) -> Results:
        """The loop on a GPU: canvases stay `width` wide and where they are, an iteration is two CUDA graphs.

        What an iteration left as it was is not edited any more. While the device fills placeholders the host learns
        how many sentences had edits, so that no more than that one pass is made in vain.
        """
        results = Results(len(now.rows), width, model.pad_id)
        now.widen(width, model.pad_id)
        now = now.apart()
        device = now.tokens.device
        unfinished, edit, write = Running(device), None, None
        for iteration in range(1, self.max_iterations + 1):
            if edit is None:
                edit = repeated(model, partial(self._edit_in_place, model, now), device)
                write = repeated(model, partial(_fill_in_place, model, now), device)
            if iteration == 1 and self.initial is None:
                self._edit_in_place(model, now, deletes=False)
            else:
                edit()
            unfinished.ask(now.running)
            write()
            left = [i for i, runs in enumerate(unfinished.read()) if runs]
            if not left or worth_capturing_anew(len(left), *now.tokens.shape, device):
                results.put(now, now.iterations)
                if not left:
                    return results
                now, edit = now.select(model, on_device(left, device)), None
        end_cycles(model, now)
        results.put(now, now.iterations)
        return results

    def _edit_in_place(self, model: EditModel, now: Sentences, deletes: bool = True) -> None:
        now.earlier.copy_(now.before)
        now.before.copy_(now.tokens)
        now.before_log_probs.copy_(now.log_probs)
        now.iterations.add_(now.running)
        tokens, log_probs, states = now.tokens, now.log_probs, None
        if deletes:
            flags, states = deletions(model, tokens, now.memory)
            edits = delete(model, tokens, log_probs, flags & now.running[:, None])
            tokens, log_probs = edits.tokens, edits.scores
            if states is not None:  # to know which canvases stayed as they were would cost more than all of them
                states = model.edit_states(tokens, now.memory)
        bounds, width = now.bounds * now.running, tokens.shape[1]
        edits = insert(model, tokens, log_probs, now.memory, states, self.eos_penalty, bounds, width)
        now.tokens.copy_(edits.tokens)
        now.log_probs.copy_(edits.scores)
        now.running.logical_and_((now.tokens != now.before).any(1))


def _fill_in_place(model: EditModel, now: Sentences) -> None:
    fill(model, now.tokens, now.log_probs, now.memory, now.tokens == model.mask_id, None)
    now.running.logical_and_((now.tokens != now.before).any(1))


def _renewed(model: EditModel, now: Sentences, states: Tensor, edited: list[int]) -> Tensor:
    """states [R, W, D] of canvases some of which were edited since, with the states of these."""
    if len(edited) == len(states):
        return model.edit_states(now.tokens, now.memory)
    index = torch.tensor(edited, device=states.device)
    fresh = model.edit_states(now.tokens[index], model.select(now.memory, index))
    return states.index_copy(0, index, fresh)


def _select(
    model: EditModel, now: Sentences, states: Tensor | None, left: list[int], *lists: list[int]
) -> tuple[Sentences, Tensor | None, list[list[int]]]:
    index = torch.tensor(left, device=now.tokens.device)
    states = None if states is None else states.index_select(0, index)
    return now.select(model, index), states, [[values[i] for i in left] for values in lists]
