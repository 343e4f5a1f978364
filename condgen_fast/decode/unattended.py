"""Refinement loops on a GPU: captured pieces on a fixed canvas, and what the host learns of them on the side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.answer import Answer
from condgen_fast.decode.captured import Captured

# Canvas positions up to which the kernels of a decoder's pass take less time than launching them: a base-size pass is
# about 170 launches of 4 to 5 microseconds, and each position in it 25 million multiplications.
LAUNCH_BOUND = 1024


class Running(Answer):
    """Which sentences go on, bool [R], learned without holding a GPU up."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._gpu = device.type == "cuda"

    def one_behind(self, running: Tensor) -> list[bool] | None:
        """On the CPU `running`; on a GPU what the call before was given, of the same rows, None at the first."""
        flags = self.read() if self.asked else None
        self.ask(running)
        return flags if self._gpu else self.read()


def host_follows(device: torch.device) -> bool:
    """Whether the host may look at every step: on the CPU nobody waits for the answer."""
    return device.type == "cpu"


def worth_capturing_anew(left: int, rows: int, width: int, device: torch.device) -> bool:
    """Whether finished sentences leave: on a GPU passes over fewer rows must repay that all is captured anew."""
    if host_follows(device):
        return left < rows
    return left <= rows // 2 and rows * width > LAUNCH_BOUND


def repeated(model: Any, function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What calls `function` again and again, captured where the model says that this can be done with its passes."""
    return Captured(function, device) if getattr(model, "capturable", False) else function


def on_device(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """int64 [n] or [m, n], without waiting for a GPU."""
    on_host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
