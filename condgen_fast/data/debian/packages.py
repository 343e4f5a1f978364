"""Fetching package indexes and packages through apt, in a state folder of its own: no root, nothing installed."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

APT_HELPER = "/usr/lib/apt/apt-helper"
SOURCE_LISTS = (
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list.d/ubuntu.sources",
    "/etc/apt/sources.list",
)


@dataclass(frozen=True)
class Packages:
    """What was fetched: package indexes, and the unpacked packages, each in the folder of its name."""

    lists: Path
    root: Path

    def index(self, pattern: str) -> str:
        """The text of the package indexes whose file names match a pattern."""
        files = sorted(f for f in glob.glob(str(self.lists / pattern)) if "partial" not in f)
        if not files:
            raise FileNotFoundError(f"no package index {pattern} in {self.lists}; fetch again, without --offline")
        done = subprocess.run([APT_HELPER, "cat-file", *files], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise RuntimeError(f"{APT_HELPER} could not read the package indexes {pattern} in {self.lists}")
        return done.stdout.decode("utf-8", "replace")


def fetch(work: str | Path, packages: Sequence[str], languages: Sequence[str], *, offline: bool = False) -> Packages:
    """Fetch the package index with descriptions in these languages, and unpack packages, in the folder `work`.

    What is there already is kept; `offline` fetches nothing. Raises RuntimeError where there is no apt and when apt
    fails, FileNotFoundError when `offline` finds something missing.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb", APT_HELPER) if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            "the corpora are built from Debian packages, which needs Debian or Ubuntu; not found:"
            f" {', '.join(missing)}. Elsewhere, use line-aligned text files of your own"
        )
    work = Path(work).resolve()
    state, cache, archives, root = work / "apt/state", work / "apt/cache", work / "debs", work / "root"
    for folder in (state / "lists/partial", cache / "archives/partial", archives, root):
        folder.mkdir(parents=True, exist_ok=True)
    if not offline:
        apt = ["apt-get", "-qq", *_apt_options(state, cache, languages)]
        _run([*apt, "update"], work)
        wanted = [p for p in packages if not any(archives.glob(f"{p}_*.deb"))]
        if wanted:
            _run([*apt, "download", *wanted], archives)
    for package in packages:
        if (root / package).is_dir():
            continue
        found = sorted(archives.glob(f"{package}_*.deb"))
        if not found:
            raise FileNotFoundError(f"no package {package} in {archives}; fetch again, without --offline")
        fresh = root / f".{package}.incomplete"
        shutil.rmtree(fresh, ignore_errors=True)
        _run(["dpkg-deb", "-x", str(found[-1]), str(fresh)], work)
        fresh.rename(root / package)
    return Packages(state / "lists", root)


def _apt_options(state: Path, cache: Path, languages: Sequence[str]) -> list[str]:
    source_list = next((f for f in SOURCE_LISTS if os.path.exists(f)), None)
    if source_list is None:
        raise RuntimeError(f"apt has no list of sources; expected one of {', '.join(SOURCE_LISTS)}")
    options = {
        "Dir::State": state,
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": cache,
        "Dir::Etc::sourcelist": source_list,
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Sandbox::User": "",
        "Acquire::Languages": ",".join(languages),
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        words = " ".join(word for word in command if "::" not in word and word != "-o")
        raise RuntimeError(f"{words} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
