"""The steps of a model where nothing else of a loop is in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.captured import Captured


class Steps:
    """`model.step` after step from `state`; with `in_place`, where the model has `reserve`, captured in a CUDA graph.

    What a call returns is overwritten by the next. `steps` is the most there may be.
    """

    def __init__(self, model: Any, state: Any, steps: int, device: torch.device, *, in_place: bool) -> None:
        self._model, self._device = model, device
        reserved = model.reserve(state, steps) if in_place and hasattr(model, "reserve") else None
        self.in_place = reserved is not None
        self._state = reserved if self.in_place else state
        self._step: _InPlace | None = None
        self._once: Captured | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] -> logits [B, n, V]."""
        if not self.in_place:
            logits, self._state = self._model.step(tokens, self._state)
            return logits
        if self._once is None:
            self._step = _InPlace(self._model, self._state, torch.empty_like(tokens))
            self._once = Captured(self._step.run, self._device)
        self._step.tokens.copy_(tokens)
        self._once()
        return self._step.logits

    def select(self, rows: Tensor) -> None:
        """Only the sentences `rows` [R] go on."""
        self._state, self._step, self._once = self._model.select(self._state, rows), None, None


class _InPlace:
    """What is captured, apart from what holds the graph: in a cycle the cache and the graph would stay until the
    garbage collector comes by."""

    def __init__(self, model: Any, state: Any, tokens: Tensor) -> None:
        self.tokens, self.logits = tokens, None
        self._model, self._state = model, state

    def run(self) -> None:
        self.logits = None  # before the next are made
        self.logits, _ = self._model.step(self.tokens, self._state)
