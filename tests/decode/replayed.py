"""CUDA graphs without a GPU: what `Captured` would capture is recorded at its second call and replayed from then on.

A recording holds operations and the very tensors that they read and write; the Python of the captured function does not
run again. So whatever the function would take from Python at each step (a position that is counted there, a tensor that
is exchanged for another) stays as it was when it was recorded, as in a graph, and the results go wrong. What does not
show: a recording keeps every tensor that it has made, where a graph would overwrite those that were let go of; and it
may wait for values, which a graph cannot (`fake_gpu`).
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condgen_fast.decode.captured import Captured


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.calls.append((func, args, kwargs, [x for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def replayed(monkeypatch, *modules):
    """Yields the list of recordings that were made; `modules` are those whose `may_capture` says yes meanwhile.

    The loops of refinement have no `may_capture`: their tests say what is to run as on a GPU.
    """
    recordings = []

    def call(self: Captured) -> None:
        if not self._warm:
            self._function()
            self._warm = True
        elif self._graph is None:
            self._graph = Recording()
            recordings.append(self._graph)
            with self._graph:
                self._function()
        else:
            self._graph.replay()

    with monkeypatch.context() as patch:
        patch.setattr(Captured, "__call__", call)
        for module in modules:
            patch.setattr(module, "may_capture", lambda device: True)
        with torch.no_grad():
            yield recordings


def left_behind(decodes, monkeypatch, *modules) -> list[Captured]:
    """The graphs of a call that still live when it has returned: what only the garbage collector frees keeps a call's
    memory for a while. `modules` as in `replayed`."""
    made, init = [], Captured.__init__

    def remember(self: Captured, *arguments) -> None:
        init(self, *arguments)
        made.append(weakref.ref(self))

    with replayed(monkeypatch, *modules) as recordings, monkeypatch.context() as patch:
        decodes()  # what PyTorch loads at the first may well leave something
        patch.setattr(Captured, "__init__", remember)
        was_on = gc.isenabled()
        gc.disable()
        try:
            decodes()
            recordings.clear()
            assert made
            return [graph for graph in (ref() for ref in made) if graph is not None]
        finally:
            if was_on:
                gc.enable()
