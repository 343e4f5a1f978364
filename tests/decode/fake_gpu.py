"""A GPU that is not there: tensors without values, on device "meta", show what a loop asks of a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from condgen_fast import _library

DEVICE = torch.device("meta")


@contextmanager
def fake_gpu(monkeypatch) -> Iterator[torch.device]:
    """The device: whoever would wait for its answer (`item`, `tolist`, `nonzero`, a tensor as a condition) raises."""
    monkeypatch.setattr(_library, "require", lambda device=None: None)
    yield DEVICE


class Launches(TorchDispatchMode):
    """Counts by name the operations that would launch a kernel or a copy: all but views and allocations."""

    NONE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_reshape_alias", "_unsafe_view"}

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.partition("::")[2]
        if not is_view and name not in self.NONE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Apart:
    """A model whose own launches are not counted."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)

        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return value(*arguments)

        return call if callable(value) else value
