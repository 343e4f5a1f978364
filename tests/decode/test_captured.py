"""`Captured` on a CUDA that is not there: what runs, what is captured and replayed, where; and on a GPU that is."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from condgen_fast.decode import captured
from condgen_fast.decode.captured import Captured
from condgen_fast.decode.left_to_right import Unfinished
from condgen_fast.decode.unattended import Running


class Graph:
    """Records where it was captured; a pool is handed on only by a graph that lives."""

    def __init__(self, cuda):
        self.cuda, self.replays = cuda, 0
        cuda.living.append(self)

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local" and not gc.isenabled() and not self.cuda.capturing
        assert self.cuda.stream is not None and (pool is None or pool.graph in self.cuda.living)
        self.stream, self.made_in, self.cuda.capturing = self.cuda.stream, pool, True
        self.device = self.cuda.device

    def capture_end(self):
        assert self.cuda.capturing
        self.cuda.capturing = False

    def pool(self):
        return Pool(self)

    def replay(self):
        assert self.cuda.device == self.device
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
        self.device, self.streams = 0, {}

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextlib.contextmanager
    def at(self, device):
        before, self.device = self.device, device.index
        yield
        self.device = before

    def stream_of(self, device=None):
        """The current one; of the first device it is `current`."""
        index = self.device if device is None else device.index
        return self.current if index == 0 else self.streams.setdefault(index, Stream())


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(captured, "_FREE", captured.defaultdict(list))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(fake))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.stream_of)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.cuda, "device", fake.at)
    monkeypatch.setattr(torch, "zeros", on_the_host(torch.zeros))
    return fake


def on_the_host(make):
    return lambda *shape, device=None, pin_memory=False, **options: make(*shape, **options)


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


def test_a_device_that_is_not_the_current_one_is_made_so(cuda):
    devices = []
    once = Captured(lambda: devices.append(cuda.device), torch.device("cuda", 1))
    for _ in range(3):
        once()
    assert devices == [1, 1] and once._graph.device == 1 and cuda.device == 0
    del once
    assert not captured._FREE[cuda.current] and len(captured._FREE[cuda.streams[1]]) == 1


def test_the_collector_is_on_again_when_the_last_thread_has_captured(cuda):
    """Another thread begins within a capture and ends after it."""
    pause = captured._PAUSE.collector()
    once = Captured(lambda: cuda.capturing and pause.__enter__(), GPU)
    once()
    once()
    assert not gc.isenabled()
    pause.__exit__(None, None, None)
    assert gc.isenabled()


class Event:
    def __init__(self, recorded):
        self.recorded = recorded

    def record(self, stream=None):
        self.recorded.append(stream)

    def query(self):
        return True

    def synchronize(self):
        pass


def test_answers_are_waited_for_on_their_own_device(cuda, monkeypatch):
    """And say nothing wrong before they are there."""
    recorded, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(recorded))
    full = torch.full

    class OnDevice(torch.Tensor):
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch, "empty", on_the_host(lambda shape, **options: full(shape, 77, **options)))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, non_blocking: self)
    unfinished = Unfinished(torch.zeros((), dtype=torch.int64).as_subclass(OnDevice), 8)
    assert unfinished.count(ask=True) is None and unfinished.count(ask=False) == 8
    Running(device).ask(torch.zeros(3, dtype=torch.bool).as_subclass(OnDevice))
    assert recorded == [cuda.stream_of(device)] * 2 != [cuda.current] * 2


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
