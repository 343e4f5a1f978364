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
        self._once: Captured | None = None
        self._logits: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] -> logits [B, n, V]."""
        if not self.in_place:
            logits, self._state = self._model.step(tokens, self._state)
            return logits
        if self._once is None:
            self._tokens, self._once = torch.empty_like(tokens), Captured(self._step, self._device)
        self._tokens.copy_(tokens)
        self._once()
        return self._logits

    def select(self, rows: Tensor) -> None:
        """Only the sentences `rows` [R] go on."""
        self._state, self._once = self._model.select(self._state, rows), None

    def _step(self) -> None:
        self._logits = None  # before the next are made
        self._logits, _ = self._model.step(self._tokens, self._state)
