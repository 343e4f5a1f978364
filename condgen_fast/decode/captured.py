"""A piece of a decoding loop that is repeated on the same tensors: on a GPU it becomes a CUDA graph."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Place:
    """Where graphs are captured one after the other on the current device: a stream, and a memory pool.

    What a graph leaves behind, the next one on its place uses again. cuBLAS keeps a workspace for each stream that it
    was captured on, so that those of new streams would add up (pytorch/pytorch#99196); two graphs that live at the same
    time have two places, as the end of one would take the workspace from the other (#193402). The allocator keeps the
    pool of a graph that is no more; only a graph that still lives can hand its pool on: `_holder`.
    """

    def __init__(self) -> None:
        self._stream, self._holder = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.zeros(1, device="cuda")
        self._capture(self._holder, lambda: torch.zeros(1, device="cuda"), None)

    def capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._capture(graph, function, self._holder.pool())
        return graph

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], object], pool: Any) -> None:
        """What torch.cuda.graph() does, without its wait for the device and without emptying the allocator's cache.

        What the garbage collector might free meanwhile, a kernel or another graph, would break the capture.
        """
        current = torch.cuda.current_stream()
        with _PAUSE.collector():
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
            current.wait_stream(self._stream)


class _Pause:
    """Of the garbage collector, which is on again when the last of the threads that asked for it is done."""

    def __init__(self) -> None:
        self._lock, self._threads, self._was_on = threading.Lock(), 0, False

    @contextmanager
    def collector(self) -> Iterator[None]:
        with self._lock:
            if self._threads == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0 and self._was_on:
                    gc.enable()


_PAUSE = _Pause()


# Of each stream that graphs are launched on: there they use a pool in turn.
_FREE: defaultdict[torch.cuda.Stream, list[_Place]] = defaultdict(list)


class Captured:
    """Calls `function()` again and again, on a GPU with one launch for all of it.

    `function` takes and returns nothing: it reads and writes tensors in place, which must live as long as this object,
    and neither waits for the device nor changes a shape. On a GPU its first call runs as it is, so that kernels are
    compiled and libraries take their workspace; the second is captured; from then on the graph is replayed and the
    Python in `function` does not run any more. On other devices every call runs it.

    `device` need not be the current one: here it is, on the stream that is current there.

    Capturing costs about two calls. What `function` allocates belongs to the graph and is overwritten by the next
    replay. Another thread may use the device meanwhile.
    """

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._place: _Place | None = None
        self._warm = False

    def __call__(self) -> None:
        if self._device.type != "cuda":
            self._function()
            return
        with torch.cuda.device(self._device):
            if not self._warm:
                self._function()
                self._warm = True
                return
            if self._graph is None:
                self._free = _FREE[torch.cuda.current_stream()]
                place = self._free.pop() if self._free else _Place()
                self._graph, self._place = place.capture(self._function), place
            self._graph.replay()

    def __del__(self) -> None:
        self._graph = None  # before its place is another's
        if self._place is not None:
            self._free.append(self._place)
