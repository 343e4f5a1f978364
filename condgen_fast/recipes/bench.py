"""Run the benchmarks of a source checkout with pytest-benchmark; each checks its result before it is timed.

condgen-fast bench                          # all families
condgen-fast bench --family kd_loss
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Bench:
    """Run the latency comparisons."""

    folder: Path = Path("benchmarks")
    """the checkout's benchmarks folder"""
    family: str | None = None
    """only this one: kd_loss, levenshtein, beam_search, refinement or decode"""
    save: Path | None = None
    """pytest-benchmark's JSON of the run"""


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
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-columns=median,iqr,rounds", *save, *files]
    if subprocess.run(command).returncode:
        raise RuntimeError("a benchmark failed; its output stands above")
