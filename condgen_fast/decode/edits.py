"""The three policies of Levenshtein refinement on canvases [R, W], and what its two loops have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.canvas import between, mean_log_prob, penalise_nothing
from condgen_fast.decode.protocols import EditModel
from condgen_fast.ops.levenshtein import AppliedEdits, apply_edits
from condgen_fast.ops.refinement import row_stats


@dataclass
class Sentences:
    """The R sentences that are still being refined."""

    memory: Any
    rows: Tensor  # int64 [R], their places in the batch
    bounds: Tensor  # int64 [R], the longest canvas each may get by insertions
    running: Tensor  # bool [R], false once an iteration left the canvas as it was
    iterations: Tensor  # int64 [R], iterations that ran while it was running, where nobody else counts them
    tokens: Tensor
    log_probs: Tensor
    before: Tensor  # the canvas that the running iteration began with, and its log-probabilities
    before_log_probs: Tensor
    earlier: Tensor  # the canvas that the iteration before it began with

    @classmethod
    def start(cls, memory: Any, tokens: Tensor, bounds: Tensor, pad_id: int) -> Sentences:
        rows = torch.arange(len(tokens), device=tokens.device)
        log_probs = torch.zeros(tokens.shape, device=tokens.device)
        no_canvas = torch.full_like(tokens, pad_id)
        running = torch.ones_like(bounds, dtype=torch.bool)
        iterations = torch.zeros_like(bounds)
        return cls(memory, rows, bounds, running, iterations, tokens, log_probs, no_canvas, log_probs, no_canvas)

    def select(self, model: EditModel, index: Tensor) -> Sentences:
        values = {f.name: getattr(self, f.name).index_select(0, index) for f in fields(self) if f.name != "memory"}
        return Sentences(model.select(self.memory, index), **values)

    def apart(self) -> Sentences:
        """With memory of its own for each tensor."""
        values = {f.name: getattr(self, f.name).clone() for f in fields(self) if f.name != "memory"}
        return Sentences(self.memory, **values)

    def trim(self, width: int) -> None:
        if self.tokens.shape[1] > width:
            self.tokens = self.tokens[:, :width].contiguous()
            self.log_probs = self.log_probs[:, :width].contiguous()

    def widen(self, width: int, pad_id: int) -> None:
        for name in ("tokens", "before", "earlier"):
            setattr(self, name, _widened(getattr(self, name), width, pad_id))
        for name in ("log_probs", "before_log_probs"):
            setattr(self, name, _widened(getattr(self, name), width, 0.0))

    def inside(self, model: EditModel) -> Tensor:
        return between((self.tokens != model.pad_id).sum(1) - 2, self.tokens.shape[1])

    def same_as_before(self) -> list[bool]:
        """Of canvases as long as before: whether they hold the same tokens."""
        width = min(self.tokens.shape[1], self.before.shape[1])
        return (self.tokens[:, :width] == self.before[:, :width]).all(1).tolist()


class Results:
    """What has become of the batch's sentences [B, width]."""

    tokens: Tensor
    log_probs: Tensor
    iterations: Tensor

    def __init__(self, batch: int, width: int, pad_id: int) -> None:
        self._batch, self._width, self._pad_id = batch, width, pad_id

    def put(self, now: Sentences, iterations: int | Tensor) -> None:
        """Note all of `now`, the whole batch at first; what goes on is noted again."""
        if isinstance(iterations, int):
            iterations = torch.full_like(now.rows, iterations)
        if len(now.rows) == self._batch:
            self.tokens, self.log_probs, self.iterations = now.tokens, now.log_probs, iterations
            return
        self.tokens = _put(self.tokens, now.rows, now.tokens, self._width, self._pad_id)
        self.log_probs = _put(self.log_probs, now.rows, now.log_probs, self._width, 0.0)
        self.iterations = self.iterations.index_copy(0, now.rows, iterations)


def _put(all_rows: Tensor, rows: Tensor, values: Tensor, width: int, filler: float) -> Tensor:
    return _widened(all_rows, width, filler).index_copy(0, rows, _widened(values, width, filler))


def deletions(
    model: EditModel, tokens: Tensor, memory: Any, states: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which tokens the deletion policy deletes, bool [R, W] (of bos, eos and padding it says anything), and the states
    that it read, where the placeholder policy reads the same; `states` are these if they are known already."""
    if getattr(model, "shares_edit_states", False):
        states = model.edit_states(tokens, memory) if states is None else states
        logits = model.delete_head(states)
    else:
        logits = model.delete_logits(tokens, memory)
    return logits[..., 1] > logits[..., 0], states


def delete(model: EditModel, tokens: Tensor, log_probs: Tensor, flags: Tensor) -> AppliedEdits:
    return apply_edits(tokens, delete=flags, scores=log_probs, **_ids(model))


def insert(
    model: EditModel,
    tokens: Tensor,
    log_probs: Tensor,
    memory: Any,
    states: Tensor | None,
    eos_penalty: float,
    bounds: Tensor,
    width: int,
) -> AppliedEdits:
    """The placeholders that the policy wants, in canvases of `width`, no row made longer than its bound.

    states: what the placeholder policy reads, where it is known.
    """
    logits = model.insert_logits(tokens, memory) if states is None else model.insert_head(states)
    counts = row_stats(penalise_nothing(logits, eos_penalty)).token
    return apply_edits(tokens, insert=counts, bounds=bounds, scores=log_probs, max_length=width, **_ids(model))


def _ids(model: EditModel) -> dict[str, int]:
    return {"pad_id": model.pad_id, "bos_id": model.bos_id, "eos_id": model.eos_id, "mask_id": model.mask_id}


def end_cycles(model: EditModel, now: Sentences) -> Tensor:
    """Put back the canvas before the last iteration where the two alternate and it is the better one -> bool [R].

    The canvases are of one width.
    """
    swung = (now.tokens == now.earlier).all(1)
    before = _quality(model, now.before, now.before_log_probs)
    restored = swung & (before > _quality(model, now.tokens, now.log_probs))
    now.tokens = torch.where(restored[:, None], now.before, now.tokens)
    now.log_probs = torch.where(restored[:, None], now.before_log_probs, now.log_probs)
    return restored


def _quality(model: EditModel, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """float32 [R]: mean log-probability of the tokens, -inf where there are none."""
    inside = between((tokens != model.pad_id).sum(1) - 2, tokens.shape[1])
    return mean_log_prob(log_probs, inside).masked_fill(~inside.any(1), -torch.inf)


def _widened(value: Tensor, width: int, filler: float) -> Tensor:
    if value.shape[1] == width:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=filler)
