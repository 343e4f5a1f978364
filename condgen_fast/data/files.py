"""Writing a file whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def check_writable(path: str | Path) -> None:
    """Raise the OSError that writing this file would end with, as far as its folder can tell."""
    path = Path(os.path.realpath(path))
    if _is_special(path):
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file; it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: its folder is read-only")


def write_atomically(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write bytes to a file that appears under its name only once it is complete on disk.

    On any error (a full disk) a file that stood there before is left as it was and nothing is left beside it. What is
    not a regular file (/dev/null, a named pipe) is written directly.
    """
    path = Path(os.path.realpath(path))  # through a symbolic link: replace the file, not the link
    if _is_special(path):
        with open(path, "wb") as file:
            file.writelines(chunks)
        return
    check_writable(path)
    fresh = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def lock(path: str | Path, refusal: str) -> BinaryIO:
    """A file that nobody else can lock until it is closed or its process has ended; ValueError where another has it."""
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(refusal) from None
    return file


def _is_special(path: Path) -> bool:
    """Whether this is neither a file nor a folder: /dev/null, a named pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()
