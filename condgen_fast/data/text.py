"""Plain text in and out: UTF-8, one sentence a line, line-aligned files for parallel text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from condgen_fast.data.files import write_atomically


def read_lines(path: str | Path) -> list[str]:
    r"""Lines of a UTF-8 file, or of standard input for "-"; empty lines are kept.

    Lines end with \n or \r\n, and nothing else ends one; a byte order mark at the start is dropped. Bytes that are not
    UTF-8 are a ValueError that names the file and the line.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: text must be UTF-8; got byte 0x{data[error.start]:02x}") from None
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def iterate_lines(path: str | Path) -> Iterator[str]:
    """The lines of `read_lines` one after the other, of a file of any size."""
    name = "standard input" if str(path) == "-" else str(path)
    with open(sys.stdin.fileno() if str(path) == "-" else path, "rb", closefd=str(path) != "-") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise ValueError(f"{name}, line {number}: text must be UTF-8; got byte 0x{byte:02x}") from None
            yield (text.removeprefix("\ufeff") if number == 1 else text).removesuffix("\n").removesuffix("\r")


def read_parallel(source_path: str | Path, target_path: str | Path) -> tuple[list[str], list[str]]:
    """Lines of two line-aligned files; a ValueError with both counts when they are not of equal length."""
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise ValueError(
            f"{source_path} and {target_path} must have the same number of lines; got {len(source)} and {len(target)}"
        )
    return source, target


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    r"""Write lines as UTF-8, whole or not at all; "-" is standard output.

    A line that would not read back as one line (it holds \n or ends with \r) is a ValueError that names it. On any
    error, a full disk included, a file that stood there before is left as it was.
    """
    encoded = (_encode(number, line) for number, line in enumerate(lines, 1))
    if str(path) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.writelines(encoded)
        sys.stdout.buffer.flush()
    else:
        write_atomically(path, encoded)


def _encode(number: int, line: str) -> bytes:
    if "\n" in line or line.endswith("\r"):
        raise ValueError(f"line {number} must not hold a line break; got {line[:60]!r}")
    return line.encode("utf-8") + b"\n"
