"""What is installed, what was built, and which implementation each op takes on each device here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata, util

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from condgen_fast import _library, ops


def main() -> None:
    """Print the report."""
    print(report())


def report() -> str:
    """Describe versions, what was built and for what, and which implementation ``impl="auto"`` takes here.

    The table is observed, not looked up: each op runs once on a few numbers.
    """
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    table = [["op", *devices]]
    table += [[name, *(_implementation(call, device) for device in devices)] for name, call in _CALLS.items()]
    columns = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip() for row in table]
    return "\n".join([*_versions(), "", *_built(), "", 'Implementations that impl="auto" takes:', *rows])


def _versions() -> list[str]:
    lines = [f"condgen_fast {_version('condgen_fast')}, Python {platform.python_version()}, {platform.platform()}"]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    lines.append(f"torch {torch.__version__} ({cuda}, {torch.get_num_threads()} threads), triton {_version('triton')}")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        lines.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    return lines


def _built() -> list[str]:
    problems = _library.problems()
    lines = [f"Libraries in {_library.directory()}:"]
    if util.find_spec("condgen_fast._C") is not None:
        from condgen_fast import _C

        info = _C.build_info()
        lines.append(f"built by {info['compiler']} against torch {info['torch']}")
        lines.append(f"CPU: {', '.join(info['cpu_capabilities'])}")
        if info["cuda"]:
            lines.append(f"CUDA: nvcc {info['cuda']} for {', '.join(info['cuda_architectures'])}")
        else:
            lines.append("CUDA: not built")
    if "cpu" not in problems:
        lines.append(f"CPU library loaded, instruction set in use: {torch.ops.condgen_fast.cpu_capability()}")
    if "cuda" not in problems:
        lines.append("CUDA library loaded")
    lines += [f"{name.upper()} library not loaded: {problem}" for name, problem in problems.items()]
    if problems.get("cpu"):
        lines.append(f"Build it in the source folder with: {_library.BUILD_COMMAND}")
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class _Seen(TorchDispatchMode):
    """Collects the names of our ops that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "condgen_fast":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _implementation(call: Callable[[torch.device], object], name: str) -> str:
    device = torch.device(name)
    seen = _Seen()
    try:
        with seen:
            call(device)
    except Exception as error:  # whatever is wrong with an op, the others still have to be reported
        return f"none: {(str(error) or type(error).__name__).splitlines()[0].split(' (')[0]}"
    if any("triton" in op for op in seen.names) or (device.type == "cuda" and not seen.names):
        return "Triton"  # a kernel that Triton launches by itself passes no dispatcher
    if not seen.names:
        return "reference"
    return f"C++ ({torch.ops.condgen_fast.cpu_capability()})" if device.type == "cpu" else "CUDA"


def _logits(device: torch.device) -> torch.Tensor:
    return torch.linspace(-1, 1, 12, device=device).reshape(2, 6)


def _ids(device: torch.device) -> torch.Tensor:
    return torch.tensor([[1, 4, 5, 2], [1, 5, 2, 0]], device=device)


_SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "mask_id": 3}
_CALLS: dict[str, Callable[[torch.device], object]] = {
    "kd_loss": lambda d: ops.kd_loss(_logits(d), -_logits(d), torch.zeros(2, dtype=torch.int64, device=d)),
    "linear_kd_loss": lambda d: ops.linear_kd_loss(_logits(d), _logits(d), _logits(d), -_logits(d), alpha=1.0),
    "kd_loss_parts": lambda d: ops.kd_loss_parts(_logits(d), -_logits(d), torch.zeros(2, dtype=torch.int64, device=d)),
    "edit_oracle": lambda d: ops.edit_oracle(_ids(d), _ids(d), pad_id=0),
    "edit_alignment": lambda d: ops.edit_alignment(_ids(d), _ids(d), pad_id=0, gap_id=-1),
    "edit_distance": lambda d: ops.edit_distance(_ids(d), _ids(d), pad_id=0),
    "apply_edits": lambda d: ops.apply_edits(_ids(d), delete=_ids(d) == 5, **_SPECIAL),
    "random_delete": lambda d: ops.random_delete(_ids(d), pad_id=0, bos_id=1, eos_id=2),
    "random_mask": lambda d: ops.random_mask(_ids(d), mask_id=4, pad_id=0, bos_id=1, eos_id=2),
    "random_shuffle": lambda d: ops.random_shuffle(_ids(d), pad_id=0, bos_id=1, eos_id=2),
    "beam_topk": lambda d: ops.beam_topk(_logits(d)[None], torch.zeros(1, 2, device=d), 2),
    "row_stats": lambda d: ops.row_stats(_logits(d)),
    "remask": lambda d: ops.remask(
        _logits(d), torch.tensor([1, 2], device=d), maskable=torch.ones(2, 6, dtype=torch.bool, device=d)
    ),
    "commit": lambda d: ops.commit(
        ops.RowStats(_ids(d), *[_logits(d)[:, :4].contiguous()] * 3), _ids(d), maskable=_ids(d) == 5, policy="quota",
        quota=1,
    ),
}  # fmt: skip
