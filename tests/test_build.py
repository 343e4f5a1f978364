"""What was built is found, described, chosen by instruction set, and done without where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import torch

from condgen_fast import _library, doctor

OPS = ("kd_loss", "linear_kd_loss", "kd_loss_parts", "edit_oracle", "edit_alignment", "edit_distance", "apply_edits",
       "random_delete", "random_mask", "random_shuffle", "beam_topk", "row_stats", "remask", "commit")  # fmt: skip
CAPABILITIES = ("baseline", "avx2", "avx512")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_library_is_built_and_loaded():
    assert _library.load(), _library.problems()
    _library.require()
    _library.require(torch.device("cpu"))
    assert _library.load()


def test_a_source_distribution_has_the_sources(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_build_info():
    from condgen_fast import _C, __version__

    info = _C.build_info()
    assert info["version"] == __version__
    assert info["cpu_capabilities"][0] == "baseline" and set(info["cpu_capabilities"]) <= set(CAPABILITIES)
    assert info["torch"][0].isdigit() and info["compiler"]
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_doctor_names_an_implementation_for_every_op():
    text = doctor.report()
    assert f"torch {torch.__version__}" in text and f"instruction set in use: {doctor_capability()}" in text
    rows = {line.split()[0]: line for line in text.split('Implementations that impl="auto" takes:')[1].splitlines()[2:]}
    assert set(rows) >= set(OPS)
    for op in OPS:
        assert f"C++ ({doctor_capability()})" in rows[op], rows[op]


def doctor_capability() -> str:
    return torch.ops.condgen_fast.cpu_capability()


def test_devices_without_kernels_are_refused():
    with pytest.raises(RuntimeError, match="no compiled kernels for mps"):
        _library.require(torch.device("mps"))
    if not _library.cuda_loaded():
        with pytest.raises(RuntimeError, match="CONDGEN_FAST_CUDA=1 pip install --no-build-isolation -e ."):
            _library.require(torch.device("cuda"))


@pytest.mark.parametrize("library", ["absent", "damaged"])
def test_without_the_library_references_work_and_ops_name_the_command(library, tmp_path):
    if library == "damaged":
        (tmp_path / "libcondgen_fast_cpu.so").write_bytes(b"not a library")
    done = run_python(
        """
        import torch, condgen_fast
        from condgen_fast import doctor
        tokens, target = torch.tensor([[1, 4, 5, 2]]), torch.tensor([[1, 5, 2, 0]])
        print(condgen_fast.edit_distance(tokens, target, pad_id=0, impl="reference").tolist())
        try:
            condgen_fast.edit_distance(tokens, target, pad_id=0)
        except RuntimeError as error:
            print(error)
        print(doctor.report())
        """,
        CONDGEN_FAST_LIBRARY_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    distance, error = done.stdout.split("\n", 1)
    assert distance == "[1]"
    assert error.startswith("the compiled library of condgen_fast is missing (")
    assert "libcondgen_fast_cpu.so" in error and "pip install --no-build-isolation -e ." in error
    assert "CPU library not loaded" in error and "none: the compiled library" in error


@pytest.mark.parametrize("wanted", CAPABILITIES)
def test_capability_can_be_lowered(wanted):
    code = """
        import torch, condgen_fast
        print(torch.ops.condgen_fast.cpu_capability())
        tokens = torch.tensor([[1, 4, 5, 2]])
        assert condgen_fast.edit_distance(tokens, tokens.flip(1), pad_id=0).item() == 4
        logits = torch.linspace(-1, 1, 40).reshape(1, 2, 20)
        found = condgen_fast.beam_topk(logits, torch.zeros(1, 2), 2)
        assert found.tokens.tolist() == [[19, 19]] and found.parents.tolist() == [[0, 1]]
    """
    done = run_python(code, CONDGEN_FAST_CPU_CAPABILITY=wanted)
    assert done.returncode == 0, done.stderr
    best = run_python(code, CONDGEN_FAST_CPU_CAPABILITY="").stdout.strip()
    assert done.stdout.strip() == min(wanted, best, key=CAPABILITIES.index)


def test_unknown_capability_is_refused():
    code = "import torch, condgen_fast; torch.ops.condgen_fast.cpu_capability()"
    done = run_python(code, CONDGEN_FAST_CPU_CAPABILITY="sse9")
    assert done.returncode != 0
    assert "ValueError: CONDGEN_FAST_CPU_CAPABILITY must be baseline, avx2 or avx512; got sse9" in done.stderr
