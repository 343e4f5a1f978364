"""What the host asks a device and reads later, so that a GPU is not kept waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Answer:
    """A tensor's values on the host: `ask` has them copied, `read` waits for that copy alone, while the device works on
    what was launched since."""

    def __init__(self) -> None:
        self.asked = False  # and not read
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def ask(self, values: Tensor) -> None:
        gpu = values.device.type == "cuda"
        if self._copy is None or self._copy.shape != values.shape:
            self._copy = torch.zeros(values.shape, dtype=values.dtype, pin_memory=gpu)
        self._copy.copy_(values, non_blocking=True)
        if gpu:
            self._event = self._event or torch.cuda.Event()
            # of the tensor's device, which need not be the current one
            self._event.record(torch.cuda.current_stream(values.device))
        self.asked = True

    def arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._event is None or self._event.query()

    def read(self) -> Any:
        """What was asked last, as `tolist` gives it."""
        if self._event is not None:
            self._event.synchronize()
        self.asked = False
        return self._copy.tolist()
