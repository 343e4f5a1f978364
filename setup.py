"""Builds the libraries with CMake, which alone describes them; pyproject.toml has the rest."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure, build and install with CMake: into the source package for `-e .`, else into the wheel's."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        destination = (ROOT if in_place else Path(self.build_lib).resolve()) / "condgen_fast"
        build = ROOT / "build" / sys.implementation.cache_tag
        build.mkdir(parents=True, exist_ok=True)
        torch = util.find_spec("torch")
        if torch is None:
            raise SystemExit("torch must be installed before condgen_fast is built, and with --no-build-isolation")
        options = {
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "CMAKE_INSTALL_PREFIX": destination,
            "Python_EXECUTABLE": sys.executable,
            "CONDGEN_FAST_VERSION": self.distribution.get_version(),
            "CONDGEN_FAST_TORCH_DIR": torch.submodule_search_locations[0],
            "CONDGEN_FAST_TORCH_VERSION": metadata.version("torch"),
            "CONDGEN_FAST_CUDA": os.environ.get("CONDGEN_FAST_CUDA", "AUTO"),
            "CONDGEN_FAST_CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        }
        cmake = _tool("cmake")
        with open(build / ".lock", "w") as lock:  # two installs at once take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            settings = [f"-D{name}={value}" for name, value in options.items()]
            subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *settings])
            subprocess.check_call([cmake, "--build", build])
            for stale in destination.glob("*.so"):
                stale.unlink()
            subprocess.check_call([cmake, "--install", build])

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "condgen_fast").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build condgen_fast: pip install {name}")
    return found


# `depends` puts the sources into source distributions.
SOURCES = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))]
setup(ext_modules=[Extension("condgen_fast._C", sources=[], depends=SOURCES)], cmdclass={"build_ext": CMakeBuild})
