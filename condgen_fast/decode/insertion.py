"""Insertion-only decoding (Stern et al. 2019): slots between tokens take new ones until none wants any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
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
from condgen_fast.decode.protocols import EditModel, InsertionModel
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import on_device
from condgen_fast.ops.levenshtein import apply_edits
from condgen_fast.ops.refinement import remask, row_stats


@dataclass(frozen=True)
class InsertionDecoding:
    """Decoding of an `InsertionModel`, or of an `EditModel` whose deletions are left out, by insertions alone.

    In each iteration every slot between two tokens takes its most probable token, or nothing where "nothing" (eos) is
    most probable; "sequential" inserts into one slot only, that of the most probable token. The slots of an `EditModel`
    take as many tokens as it says, at most `per_slot`; "sequential" takes one, where a slot is least likely to stay
    empty. A sentence is finished when no slot takes anything; that confirming iteration counts in
    `Hypotheses.iterations`. Balanced training takes about log2(n) + 1 iterations in parallel, n + 1 in sequence.

    What stands in a canvas is never changed, so tokens in `initial` appear in the output in their order. bos, eos, pad
    and mask are never inserted. A row stays within `max_length`: insertions furthest right give way first.
    `Hypotheses.scores` are mean log-probabilities of the tokens (0 for an empty output), each of the iteration that
    inserted it; given tokens have log-probability 0, as has eos.

    The host looks at every iteration, so a GPU waits once in each.

    The package has no model with slots and no recipe that trains one: an `InsertionModel` is the user's own. Ready to
    use are Levenshtein Transformers, the shipped one among them, without their deletions. They were trained to have
    these, so the output repeats words that `levenshtein` would delete; what it is good for is words that must stay:

        model, vocabulary = load_model("levenshtein-en-de")
        source = [[*ids, model.eos_id] for ids in vocabulary.encode(["Open the file."])]
        found = decode(model, source, InsertionDecoding(initial=vocabulary.encode(["Datei"])))
        vocabulary.decode([found.to_lists()[0][0]])  # ["Öffnen Sie die Datei."]

    Source: "Insertion Transformer", arXiv:1902.03249, sections 3 and 4.
    """

    model_protocol: ClassVar[tuple[type, ...]] = (InsertionModel, EditModel)

    # Iterations a sentence gets at most, the confirming one included; None: as many as it takes.
    max_iterations: int | None = None
    # parallel or sequential
    mode: str = "parallel"
    # Tokens that one slot takes in an iteration, of an EditModel in parallel; None: as many as it says. An
    # InsertionModel's takes one.
    per_slot: int | None = None
    # Subtracted from the logit of "nothing"; more makes outputs longer.
    eos_penalty: float = 0.0
    # Tokens that the output must hold, in this order: a list of ids per sentence or int64 [B, L] right-padded; no bos,
    # eos, mask.
    initial: Tensor | Sequence[Sequence[int]] | None = field(default=None, compare=False)
    # Longest output, eos counted; None: max(10, 2·S) for S source tokens. Never more than the model's positions hold. A
    # longer `initial` is not cut.
    max_length: int | None = None
    # Record every step in `Hypotheses.trace`; costs a copy to the host per step.
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("max_iterations", "per_slot", "max_length"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, minimum=1, integer=True)
        check_choice(self.mode, "mode", ("parallel", "sequential"))
        check_number(self.eos_penalty, "eos_penalty", minimum=0.0)

    def run(self, model: InsertionModel | EditModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; one synchronisation an iteration."""
        slots = hasattr(model, "slot_logits")
        batch, device = source.shape[0], source.device
        ids = {name: getattr(model, name) for name in ("pad_id", "bos_id", "eos_id", "mask_id")}
        memory = model.encode(source, source_lengths)
        tokens, lengths = initial_canvas(self.initial, model, batch, device)
        bounds = self._bounds(model, source_lengths)
        log_probs = torch.zeros(tokens.shape, device=device)
        recorder = Recorder(model, batch) if self.trace else None
        if recorder and self.initial is not None:
            recorder.record(0, "start", list(range(batch)), tokens, log_probs, between(lengths - 2, tokens.shape[1]))

        width = max([tokens.shape[1], *bounds.tolist()])
        final_tokens = torch.full((batch, width), model.pad_id, device=device)
        final_log_probs = torch.zeros(batch, width, device=device)
        rows, active, iterations = torch.arange(batch, device=device), list(range(batch)), [0] * batch
        iteration = 0
        while active and iteration != self.max_iterations:
            iteration += 1
            insert, chosen, confidence = (self._slots if slots else self._counts)(model, tokens, lengths, memory)
            room = (bounds - lengths).clamp(min=0)[:, None]
            insert = torch.minimum(insert, (room - insert.cumsum(1) + insert).clamp(min=0))
            lengths = lengths + insert.sum(1)
            counts, host_lengths = torch.stack([insert.sum(1), lengths]).tolist()  # the synchronisation
            for row in active:
                iterations[row] = iteration
            if not all(counts):
                _note(final_tokens, tokens, rows), _note(final_log_probs, log_probs, rows)
                kept = [i for i, count in enumerate(counts) if count]
                active = [active[i] for i in kept]
                if not active:
                    break
                left = true_positions(insert.any(1), len(active))
                memory, rows, bounds, lengths = model.select(memory, left), rows[left], bounds[left], lengths[left]
                tokens, log_probs, insert = tokens[left], log_probs[left], insert[left]
                chosen, confidence = chosen[left], confidence[left]
                counts, host_lengths = [counts[i] for i in kept], [host_lengths[i] for i in kept]
            edited = apply_edits(tokens, insert=insert, scores=log_probs, max_length=max(host_lengths), **ids)
            tokens, log_probs = edited.tokens, edited.scores
            masked = tokens == model.mask_id
            where = true_positions(masked, sum(counts))
            if slots:
                taken = true_positions(insert > 0, sum(counts))
                token, log_prob = chosen.flatten()[taken], confidence.flatten()[taken]
            else:
                if recorder:
                    recorder.record(iteration, "insert", active, tokens, log_probs, masked)
                token, log_prob = predict(model, tokens, memory, where)
            tokens.view(-1)[where], log_probs.view(-1)[where] = token, log_prob
            if recorder:
                recorder.record(iteration, "put" if slots else "fill", active, tokens, log_probs, masked)
        if active:
            _note(final_tokens, tokens, rows), _note(final_log_probs, log_probs, rows)

        lengths, rounds = (final_tokens != model.pad_id).sum(1) - 2, on_device(iterations, device)
        return hypotheses(
            model,
            final_tokens[:, None],
            final_log_probs[:, None],
            lengths[:, None],
            mean_log_prob(final_log_probs, between(lengths, width))[:, None],
            rounds,
            recorder.traces(rounds, final_tokens, final_log_probs) if recorder else None,
        )

    def _bounds(self, model: InsertionModel | EditModel, source_lengths: Tensor) -> Tensor:
        """int64 [B]: the longest canvas each may get, bos and eos counted."""
        if self.max_length is None:
            bounds = (2 * source_lengths).clamp(min=10) + 1
        else:
            bounds = torch.full_like(source_lengths, self.max_length + 1)
        longest = getattr(model, "max_positions", None)
        return bounds if longest is None else bounds.clamp(max=longest)

    def _slots(
        self, model: InsertionModel, tokens: Tensor, lengths: Tensor, memory: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How many tokens each slot takes [R, L-1], 0 or 1; which, and its log-probability beside "nothing"."""
        logits = model.slot_logits(tokens, memory).clone()
        for token in {model.bos_id, model.pad_id, model.mask_id} - {model.eos_id}:
            logits[..., token] = -torch.inf
        logits[..., model.eos_id] -= self.eos_penalty
        stats = row_stats(logits)
        slot = torch.arange(tokens.shape[1] - 1, device=tokens.device) < lengths[:, None] - 1
        wanted = slot & (stats.token != model.eos_id) & (stats.log_prob > -torch.inf)
        if self.mode == "sequential":
            wanted = remask(-stats.log_prob, torch.ones_like(lengths), maskable=wanted)
        return wanted.long(), stats.token, stats.log_prob

    def _counts(
        self, model: EditModel, tokens: Tensor, lengths: Tensor, memory: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How many masks each slot takes [R, L-1]; what else `_slots` returns is not known yet."""
        logits = penalise_nothing(model.insert_logits(tokens, memory), self.eos_penalty)
        slot = torch.arange(tokens.shape[1] - 1, device=tokens.device) < lengths[:, None] - 1
        insert = row_stats(logits).token * slot
        if self.mode == "sequential":
            empty = logits.float().log_softmax(-1)[..., 0]
            insert = remask(empty, torch.ones_like(lengths), maskable=insert > 0).long()
        elif self.per_slot is not None:
            insert = insert.clamp(max=self.per_slot)
        return insert, insert, insert


def _note(final: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write canvases [R, L] over the beginnings of `rows`; a canvas only ever grows, so no stale end remains."""
    final[rows, : values.shape[1]] = values
