"""Loads the compiled libraries once; without them an op says which command builds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e ."

_loaded: bool | None = None  # None: not tried yet
_cuda_loaded = False
_cpu_problem = ""
_cuda_problem = ""


def directory() -> Path:
    """The folder of the compiled libraries: the package, or ``CONDGEN_FAST_LIBRARY_DIR`` for a private build."""
    return Path(os.environ.get("CONDGEN_FAST_LIBRARY_DIR") or Path(__file__).parent)


def load() -> bool:
    """Load what is compiled, once -> whether the CPU library, which declares all ops, is there."""
    if _loaded is None:
        _load()
    return bool(_loaded)


def cuda_loaded() -> bool:
    """Whether the CUDA kernels are there as well (they load under a CUDA build of torch only)."""
    return load() and _cuda_loaded


def require(device: torch.device | None = None) -> None:
    """Raise RuntimeError with the command that builds what is missing for tensors on ``device`` (default: the CPU)."""
    if not load():
        raise RuntimeError(
            f"the compiled library of condgen_fast is missing ({_cpu_problem}); build it in the source folder with\n"
            f"    {BUILD_COMMAND}\n"
            'or use the slow reference with impl="reference"'
        )
    if device is not None and device.type != "cpu" and not (device.type == "cuda" and _cuda_loaded):
        if device.type != "cuda":
            raise RuntimeError(f'condgen_fast has no compiled kernels for {device.type}; use impl="reference"')
        raise RuntimeError(
            f"the CUDA kernels of condgen_fast are missing ({_cuda_problem}); build them in the source folder with\n"
            f"    CONDGEN_FAST_CUDA=1 {BUILD_COMMAND}\n"
            'or use the slow reference with impl="reference"'
        )


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorate the fake of ``torch.ops.condgen_fast.<name>``; without effect where no library declares that op."""
    if load() and hasattr(torch.ops.condgen_fast, name):
        return torch.library.register_fake(f"condgen_fast::{name}")
    return lambda function: function


def problems() -> dict[str, str]:
    """Why a library is not loaded: {"cpu": reason, "cuda": reason}, only those that are not."""
    load()
    found = {"cpu": "" if _loaded else _cpu_problem, "cuda": "" if _cuda_loaded else _cuda_problem}
    return {name: reason for name, reason in found.items() if reason}


def _load() -> None:
    global _loaded, _cuda_loaded, _cpu_problem, _cuda_problem
    _cpu_problem = _load_one(directory() / "libcondgen_fast_cpu.so")
    _loaded = not _cpu_problem
    if not _loaded:
        _cuda_problem = "the CPU library, which declares the ops, is missing"
    elif torch.version.cuda is None:
        _cuda_problem = f"torch {torch.__version__} is built without CUDA"
    else:
        _cuda_problem = _load_one(directory() / "libcondgen_fast_cuda.so")
        _cuda_loaded = not _cuda_problem


def _load_one(path: Path) -> str:
    if not path.is_file():
        return f"no {path.name} in {path.parent}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name}: {error}"
    return ""
