"""`Captured` on a CUDA that is not there: what runs, what is captured and replayed, where; and on a GPU that is."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from condgen_fast.decode import captured
from condgen_fast.decode.captured import Captured


class Graph:
    """Records where it was captured; a pool is handed on only by a graph that lives."""

    def __init__(self, cuda):
        self.cuda, self.replays = cuda, 0
        cuda.living.append(self)

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local" and not gc.isenabled() and not self.cuda.capturing
        assert self.cuda.stream is not None and (pool is None or pool.graph in self.cuda.living)
        self.stream, self.made_in, self.cuda.capturing = self.cuda.stream, pool, True

    def capture_end(self):
        assert self.cuda.capturing
        self.cuda.capturing = False

    def pool(self):
        return Pool(self)

    def replay(self):
        self.replays += 1


class Pool:
    def __init__(self, graph):
        self.graph = graph


class Stream:
    def wait_stream(self, other):
        pass


class Cuda:
    """What `captured` calls of torch.cuda. `living`: graphs that nobody has let go."""

    def __init__(self):
        self.living, self.capturing, self.stream, self.current = [], False, None, Stream()

    def on(self, stream):
        @contextlib.contextmanager
        def within():
            before, self.stream = self.stream, stream
            yield
            self.stream = before

        return within()


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(captured, "_FREE", captured.defaultdict(list))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(fake))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    return fake


GPU = torch.device("cuda", 0)


def test_the_first_call_runs_the_second_is_captured_all_others_replayed(cuda):
    calls = []
    once = Captured(lambda: calls.append(cuda.capturing), GPU)
    for _ in range(5):
        once()
    assert calls == [False, True] and once._graph.replays == 4 and gc.isenabled()
    everywhere = []
    here = Captured(lambda: everywhere.append(1), torch.device("cpu"))
    for _ in range(3):
        here()
    assert len(everywhere) == 3 and here._graph is None


def test_graphs_take_each_others_place_only_one_after_the_other(cuda):
    def captured_once():
        once = Captured(lambda: None, GPU)
        once()
        once()
        return once

    first, second = captured_once(), captured_once()
    places = {first._place, second._place}
    assert len(places) == 2 and first._graph.stream is not second._graph.stream
    assert first._graph.made_in.graph is first._place._holder is not second._place._holder
    free = captured._FREE[cuda.current]
    del first
    third = captured_once()
    assert third._place in places and third._place is not second._place and not free
    del second, third
    assert set(free) == places
    captured_once()  # gives its place back at once
    assert set(free) == places and len(free) == 2
    cuda.current = Stream()
    assert captured_once()._place not in places


def test_a_function_that_fails_leaves_no_capture_open_and_the_collector_on(cuda):
    def fail():
        if cuda.capturing:
            raise KeyError

    once = Captured(fail, GPU)
    once()
    with pytest.raises(KeyError):
        once()
    assert not cuda.capturing and gc.isenabled()
    del once
    assert not captured._FREE[cuda.current]  # nobody captures where that went wrong


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_many_graphs_take_no_more_memory_than_a_few():
    x, weight = torch.randn(64, 512, device="cuda"), torch.randn(4096, 512, device="cuda")
    y = torch.zeros(64, 4096, device="cuda")

    def multiply():
        y.add_(torch.relu(x @ weight.T))

    reserved = []
    for _ in range(40):
        y.zero_()
        once = Captured(multiply, x.device)
        for _ in range(4):
            once()
        torch.testing.assert_close(y, 4 * torch.relu(x @ weight.T))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[3]
