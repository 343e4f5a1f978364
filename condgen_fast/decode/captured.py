"""A piece of a decoding loop that is repeated on the same tensors: on a GPU it becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Captured:
    """Calls `function()` again and again, on a GPU with one launch for all of it.

    `function` takes and returns nothing: it reads and writes tensors in place, which must live as long as this object,
    and neither waits for the device nor changes a shape. On a GPU its first call runs as it is, so that kernels are
    compiled and libraries take their workspace; the second is captured; from then on the graph is replayed and the
    Python in `function` does not run any more. On other devices every call runs it.

    Capturing costs about two calls. What `function` allocates belongs to the graph and is overwritten by the next
    replay. Another thread may use the device meanwhile.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if self._device.type != "cuda" or not self._warm:
            self._function()
            self._warm = True
            return
        if self._graph is None:
            self._graph = _capture(self._function, self._device)
        self._graph.replay()


def _capture(function: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """What torch.cuda.graph() does, without its wait for the device and without emptying the allocator's cache."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    return graph
