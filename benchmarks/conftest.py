"""`compare`: how each benchmark times our call beside its peers and its floor, all of them in every round.

  pytest benchmarks                                        # everything
  pytest benchmarks/bench_kd_loss.py -k N1024 --budget 5   # more rounds of fewer cases
  pytest benchmarks --benchmark-json=run.json              # for benchmarks/report.py
  pytest benchmarks --benchmark-disable                    # only the checks of results, each call once

Memory: glibc's malloc returns large blocks to the kernel and faults them in anew at each call, for which eager torch,
with its large temporaries, pays most. It is at its best, and the comparison fair, with
MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_THRESHOLD_=4294967296 in the environment; what was set is recorded.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what several benchmarks share

Call = Callable[[], object]


class Compare(Protocol):
    """Time `ours`; in every round, each peer and the floor before it.

    op      the public function measured        case  shape, dtype and variant, as short text
    peers   other ways to the same result, by name; None: what it needs is not installed, so it is "not measured"
    floor   name and call of what no implementation can do without (one read of the input, say)
    pause   seconds before each call: a peer with a pool of threads of its own leaves them spinning for a while

    A result must have been checked before this is called.
    """

    def __call__(
        self,
        op: str,
        case: str,
        ours: Call,
        *,
        peers: Mapping[str, Call | None],
        floor: tuple[str, Call] | None = None,
        pause: float = 0.0,
    ) -> None: ...


LEAST_ROUNDS, MOST_ROUNDS = 7, 1000
_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget", type=float, default=2.0, help=f"seconds that a case is timed for; {LEAST_ROUNDS} rounds at least"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary, of what is not a time."""
    return request.config.stash.setdefault(_LINES, []).append


@pytest.fixture
def compare(benchmark: Any, device: str, request: pytest.FixtureRequest) -> Compare:
    def synchronised(call: Call) -> Call:
        return call if device == "cpu" else lambda: (call(), torch.cuda.synchronize())

    def timed(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def compare(
        op: str,
        case: str,
        ours: Call,
        *,
        peers: Mapping[str, Call | None],
        floor: tuple[str, Call] | None = None,
        pause: float = 0.0,
    ) -> None:
        # The floor comes right after our call of the round before: in the caches that it leaves, at its best.
        others = {name: synchronised(call) for name, call in [*([floor] if floor else []), *peers.items()] if call}
        ours = synchronised(ours)
        seconds: dict[str, list[float]] = {name: [] for name in others}

        def time_others() -> None:
            for name, call in others.items():
                time.sleep(pause)
                seconds[name].append(timed(call))
            time.sleep(pause)

        def warm_up() -> float:
            return sum(timed(call) for call in [*others.values(), ours])

        if benchmark.disabled:  # each once, untimed
            benchmark.pedantic(ours, setup=time_others)
            return
        warm_up()
        rounds = min(max(int(request.config.getoption("budget") / warm_up()), LEAST_ROUNDS), MOST_ROUNDS)
        benchmark.pedantic(ours, setup=time_others, rounds=rounds, iterations=1)
        own = benchmark.stats.stats.data
        results = [
            {"implementation": name, "role": "peer"} | (_measured(seconds[name], own) if name in seconds else {})
            for name in peers
        ]
        if floor:
            results.append({"implementation": floor[0], "role": "floor"} | _measured(seconds[floor[0]], own))
        benchmark.group = op
        benchmark.extra_info.update(
            op=op,
            case=case,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            malloc=" ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")) or "default",
            others=results,
        )
        request.config.stash.setdefault(_LINES, []).append(_line(benchmark.extra_info, statistics.median(own)))

    return compare


def _measured(seconds: list[float], ours: list[float]) -> dict[str, float]:
    """Milliseconds, and how many of our calls fit into one: medians over the rounds, with quartiles."""
    ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    q1, median, q3 = statistics.quantiles([1000 * s for s in seconds], method="inclusive")
    ratio_q1, ratio, ratio_q3 = statistics.quantiles(ratios, method="inclusive")
    names = ("median_ms", "q1_ms", "q3_ms", "ratio", "ratio_q1", "ratio_q3")
    return dict(zip(names, (median, q1, q3, ratio, ratio_q1, ratio_q3), strict=True))


def _line(info: Mapping[str, Any], seconds: float) -> str:
    parts = [f"{info['op']:<14} {info['case']:<34} {info['device']:<5} {1000 * seconds:9.3f} ms"]
    for other in info["others"]:
        if "ratio" not in other:
            parts.append(f"{other['implementation']}: not measured")
        elif other["role"] == "floor":
            parts.append(f"{1 / other['ratio']:.2f}x the floor, {other['implementation']}")
        else:
            parts.append(f"{other['ratio']:.2f}x faster than {other['implementation']}")
    return "; ".join(parts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_LINES, []):
        terminalreporter.section(f"our time and the ratios to it, {torch.get_num_threads()} threads")
        terminalreporter.write("\n".join(lines) + "\n")
