"""Compile every CUDA kernel for sm_80 and sm_90a, print its registers and shared memory, and fail on spills.

python .ci/compile_cuda.py NVCC [family]; needs no GPU.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = Path(util.find_spec("torch").submodule_search_locations[0])
ARCHITECTURES = ("sm_80", "sm_90a")
KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def compile_one(nvcc: str, source: Path, architecture: str) -> str:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{TORCH / 'include'}"]
    packaged = Path(nvcc).parent.parent / "include"  # where the packages of PyPI put the headers
    if packaged.is_dir():
        includes.append(f"-I{packaged}")
    command = [
        nvcc, "-cubin", f"-arch={architecture}", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "--extended-lambda",
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas=-v", *includes, "-o", "/dev/null", source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def readable(names: list[str]) -> list[str]:
    """Names as in the source, without their parameters."""
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt", *names], capture_output=True, text=True).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|condgen_fast::|\(.*\)$|^void ", "", name) for name in names]


def main() -> int:
    family = sys.argv[2] if len(sys.argv) > 2 else "*"
    jobs = [(source, arch) for source in sorted(ROOT.glob(f"csrc/{family}/*_cuda.cu")) for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda job: compile_one(sys.argv[1], *job), jobs))
    kernels = [kernel for output in outputs for kernel in KERNEL.findall(output)]
    spilling = 0
    for name, (_, arch, stack, stores, loads, registers, rest) in zip(
        readable([kernel[0] for kernel in kernels]), kernels, strict=True
    ):
        spills = int(stores) + int(loads)
        spilling += spills > 0
        shared = re.search(r"(\d+) bytes smem", rest)
        print(
            f"{'SPILLS' if spills else 'ok    '} {arch:<7} {registers:>3} registers, {stack:>4} B stack, "
            f"{shared.group(1) if shared else 0:>6} B shared, {spills:>4} B spilled  {name}"
        )
    print(f"{len(jobs)} compilations, {len(kernels)} kernels, {spilling} with spills")
    return spilling > 0 or not kernels


if __name__ == "__main__":
    sys.exit(main())
