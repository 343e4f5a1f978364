"""The calls that a strategy makes of its model, to be made again: the floor of a decoding loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Recorded:
    """A model that notes each call of its methods, with the arguments as they were."""

    def __init__(self, model: Any):
        self._model, self._calls = model, []
        self.capturable = False  # or the calls that a CUDA graph makes would be missed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            self._calls.append((value, [a.clone() if isinstance(a, Tensor) else a for a in arguments]))
            return value(*arguments)

        return call

    @torch.no_grad()
    def replay(self) -> None:
        for method, arguments in self._calls:
            method(*arguments)
