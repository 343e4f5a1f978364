"""Refinement loops on a GPU: captured pieces on a fixed canvas, and what the host learns of them on the side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.captured import Captured

# Canvas positions up to which the kernels of a decoder's pass take less time than launching them: a base-size pass is
# about 170 launches of 4 to 5 microseconds, and each position in it 25 million multiplications.
LAUNCH_BOUND = 1024


class Running:
    """Which sentences go on, learned without holding a GPU up.

    `ask` has it copied to the host; `read` waits for that copy alone, while the device works on what was launched
    since.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._event: torch.cuda.Event | None = None
        self._flags: Tensor | None = None

    def ask(self, running: Tensor) -> None:
        """running: bool [R]."""
        self._flags = torch.empty(running.shape, dtype=torch.bool, pin_memory=self._gpu)
        self._flags.copy_(running, non_blocking=True)
        if self._gpu:
            self._event = torch.cuda.Event()
            # of the tensors' device, which need not be the current one
            self._event.record(torch.cuda.current_stream(running.device))

    def read(self) -> list[bool]:
        """What `ask` was given last."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()

    def one_behind(self, running: Tensor) -> list[bool] | None:
        """On the CPU `running`; on a GPU what the call before was given, of the same rows, None at the first."""
        flags = self.read() if self._event is not None else None
        self.ask(running)
        return flags if self._gpu else self.read()


def worth_capturing_anew(left: int, rows: int, width: int, device: torch.device) -> bool:
    """Whether finished sentences leave: on a GPU passes over fewer rows must repay that all is captured anew."""
    if device.type == "cpu":
        return left < rows
    return left <= rows // 2 and rows * width > LAUNCH_BOUND


def repeated(model: Any, function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What calls `function` again and again, captured where the model says that this can be done with its passes."""
    return Captured(function, device) if getattr(model, "capturable", False) else function


def on_device(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """int64 [n] or [m, n], without waiting for a GPU."""
    on_host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
