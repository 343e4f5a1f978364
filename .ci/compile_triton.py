"""Compile every Triton kernel for sm_90, print its registers and shared memory, and fail on spills.

python .ci/compile_triton.py [family]; needs no GPU. Each condgen_fast/ops/<family>/triton_kernel.py has a function
compile_cases() that yields (kernel, signature, constexprs, num_warps) and, if need be, a dict of further options:
    yield _row_stats_kernel, {"logits": "*bf16", "token": "*i64", "vocabulary": "i32"}, {"BLOCK": 4096}, 8
A type that ends with :16 is divisible by 16, as a launch would find it to be.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ROOT = Path(__file__).parent.parent
TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL (which is where spills go) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> int:
    family = sys.argv[1] if len(sys.argv) > 1 else "*"
    compiled = spilling = 0
    for path in sorted((ROOT / "condgen_fast/ops").glob(f"{family}/triton_kernel.py")):
        module = import_module(f"condgen_fast.ops.{path.parent.name}.triton_kernel")
        for kernel, signature, constexprs, num_warps, *options in module.compile_cases():
            every = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
            divisible = [i for i, kind in enumerate(every.values()) if kind.endswith(":16")]
            source = ASTSource(
                kernel,
                {name: kind.removesuffix(":16") for name, kind in every.items()},
                constexprs=constexprs,
                attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
            )
            built = triton.compile(source, target=TARGET, options={"num_warps": num_warps} | dict(*options))
            used = resources(built.asm["cubin"])
            spills = used["STACK"] + used["LOCAL"]
            compiled += 1
            spilling += spills > 0
            print(
                f"{'SPILLS' if spills else 'ok    '} {used['REG']:>3} registers, {built.metadata.shared:>6} B shared, "
                f"{spills:>4} B spilled, {num_warps} warps  {path.parent.name}.{kernel.__name__} "
                f"{' '.join(signature.values())} {constexprs}"
            )
    print(f"{compiled} kernels compiled, {spilling} with spills")
    return spilling > 0 or not compiled


if __name__ == "__main__":
    sys.exit(main())
