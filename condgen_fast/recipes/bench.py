"""Run the benchmarks of a source checkout with pytest-benchmark; each checks its result before it is timed.

condgen-fast bench                          # all families
condgen-fast bench --family kd_loss
condgen-fast bench --save run.json          # then: python benchmarks/report.py run.json --machine NAME
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# glibc's malloc then keeps large blocks that are freed. Otherwise each call of eager torch faults its temporaries in
# anew, which makes everything look faster beside it than it is.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_THRESHOLD_": "4294967296"}


@dataclass(kw_only=True)
class Bench:
    """Run the latency comparisons."""

    folder: Path = Path("benchmarks")
    """the checkout's benchmarks folder"""
    family: str | None = None
    """only this one: kd_loss, levenshtein, beam_search, refinement or decode"""
    budget: float = 2.0
    """seconds that a case is timed for"""
    keep_memory: bool = True
    """malloc keeps large blocks that are freed, where torch is at its best; otherwise it does as the system's does"""
    save: Path | None = None
    """pytest-benchmark's JSON of the run, for benchmarks/report.py"""


def main(options: Bench) -> None:
    found = sorted(path.stem.removeprefix("bench_") for path in options.folder.glob("bench_*.py"))
    if not found:
        raise FileNotFoundError(
            f"folder must hold bench_*.py, as a source checkout's benchmarks/ does; got {options.folder}"
        )
    if options.family is not None and options.family not in found:
        raise ValueError(f"family must be one of {', '.join(found)}; got {options.family!r}")
    files = [str(options.folder / f"bench_{family}.py") for family in ([options.family] if options.family else found)]
    save = [f"--benchmark-json={options.save}"] if options.save else []
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-quiet", f"--budget={options.budget}", *save, *files]
    environment = os.environ | (KEEP_MEMORY if options.keep_memory else {})
    if subprocess.run(command, env=environment).returncode:
        raise RuntimeError("a benchmark failed; its output stands above")
