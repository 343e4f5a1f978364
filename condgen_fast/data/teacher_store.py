"""A store of a teacher's top-k distributions, one for every target token of a text: distillation without the teacher.

One file: a header, where each line's tokens begin, a checksum of each line, and a record of fixed size for every token
(200 bytes at k = 64, `top_k_records.py`). It is mapped into memory, not read; a line's checksum is verified whenever
the line is. `TeacherStoreWriter` fills PATH.parts, by any number of processes over any number of runs, and gives the
file its name only when every line is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.data.files import check_writable, lock, write_atomically
from condgen_fast.data.top_k_records import TopKRecords

MAGIC = b"condgen_fast top-k teacher\n"
VERSION = 1
HEADER_BYTES = 4096  # magic, CRC of the rest, JSON, zeros


def text_digest(lines: Sequence[str]) -> str:
    """SHA-256 of a text, line by line."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


class TeacherStore:
    """An open store of distributions; reads of different processes do not disturb each other.

    `k`, `vocab_size`, `temperature` (the teacher's, at which the log-probabilities were taken), `teacher` (what wrote
    it), `lengths` (numpy int64 [lines]: stored tokens of each line, eos counted; 0 for a line the teacher cannot read),
    `fingerprint` (of the header, which has checksums of everything else).
    """

    def __init__(self, path: str | Path):
        """Open a file; ValueError for one that is not a store, or truncated, or whose header or index is damaged."""
        self.path = Path(path)
        with open(self.path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if not head.startswith(MAGIC):
            raise ValueError(f"{path} is not a teacher store")
        body = head[len(MAGIC) + 4 :]
        if len(head) < HEADER_BYTES or zlib.crc32(body) != int.from_bytes(head[len(MAGIC) : len(MAGIC) + 4], "little"):
            raise ValueError(f"teacher store {path} is damaged: its header does not match its checksum")
        header = json.loads(body.rstrip(b"\0"))
        if header["version"] != VERSION:
            raise ValueError(f"teacher store {path} has format version {header['version']}; this reads {VERSION}")
        self.k, self.vocab_size, self.temperature = header["k"], header["vocab_size"], header["temperature"]
        self.teacher, self._header = header["teacher"], header
        self.fingerprint = hashlib.sha256(head).hexdigest()
        self.records = TopKRecords(self.k, self.vocab_size)
        first_record = _first_record(header["lines"])
        expected = first_record + header["tokens"] * self.records.size
        if size != expected:
            raise ValueError(f"teacher store {path} must have {expected} bytes; it has {size}: it is not complete")
        index = np.fromfile(self.path, np.uint8, first_record - HEADER_BYTES, offset=HEADER_BYTES)
        if zlib.crc32(index) != header["index"]:
            raise ValueError(f"teacher store {path} is damaged: its index does not match its checksum")
        split = 8 * (header["lines"] + 1)
        self._starts = index[:split].view("<u8").astype(np.int64)
        self._checksums = index[split : split + 4 * header["lines"]].view("<u4")
        self.lengths = np.diff(self._starts)
        shape = (header["tokens"], self.records.size)
        if header["tokens"]:
            self._records = np.memmap(self.path, np.uint8, "r", offset=first_record, shape=shape)
        else:
            self._records = np.empty(shape, np.uint8)

    def check(self, *, vocabulary: str, source: Sequence[str], target: Sequence[str]) -> None:
        """Raise ValueError unless the store was written with this vocabulary (its fingerprint) and for this text."""
        wanted = {"vocabulary": vocabulary, "source": text_digest(source), "target": text_digest(target)}
        if self._header["lines"] != len(target):
            raise ValueError(
                f"teacher store {self.path} is for a text of {self._header['lines']} lines; got one of {len(target)}"
            )
        for name, value in wanted.items():
            if self._header[name] != value:
                raise ValueError(
                    f"teacher store {self.path} was written with another {name}: {self._header[name][:12]};"
                    f" got {value[:12]}"
                )

    def read(self, lines: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """ids [n, k] int64 and log_probs [n, k] float32 of all tokens of these lines (from 0), one line after another.

        Raises ValueError where a line does not match its checksum.
        """
        rows = []
        for line in np.asarray(lines, dtype=np.int64).tolist():
            part = self._records[self._starts[line] : self._starts[line + 1]]
            if zlib.crc32(part) != self._checksums[line]:
                raise ValueError(
                    f"teacher store {self.path} is damaged: line {line + 1} does not match its checksum; write it again"
                )
            rows.append(part)
        return self.records.decode(np.concatenate(rows) if rows else self._records[:0])


class TeacherStoreWriter:
    """A store that is being written; a context manager, at whose end others may go on with it."""

    def __init__(self, parts: Path, header: Mapping, starts: np.ndarray, rank: int, world_size: int):
        self.parts, self.header, self.starts, self.rank, self.world_size = parts, header, starts, rank, world_size
        self.records = TopKRecords(header["k"], header["vocab_size"])
        self.lengths = np.diff(starts)
        self._lock = lock(parts / f"rank-{rank}.lock", f"teacher store {parts} is being written by another process")
        self._file = parts / "records"
        self._journal = parts / f"rank-{rank}.done"
        size = _first_record(header["lines"]) + int(starts[-1]) * self.records.size
        if not self._file.exists() and next(self._entries(), None) is not None:
            raise ValueError(f"teacher store {parts} lost its records; delete the folder to begin again")
        with open(self._file, "ab") as file:
            if os.fstat(file.fileno()).st_size < size:
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is too small says so now
        self._done = self.lengths == 0
        for lines, _ in self._entries():
            self._done[lines] = True

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        k: int,
        vocab_size: int,
        vocabulary: str,
        teacher: str,
        temperature: float,
        source: Sequence[str],
        target: Sequence[str],
        lengths: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
    ) -> TeacherStoreWriter:
        """Begin the store that will stand at `path`, or go on with it.

        `vocabulary` and `teacher` are fingerprints; `lengths` says how many tokens of each line are to be stored, eos
        counted, 0 for lines that are left out. Raises ValueError when PATH.parts was begun with anything else than
        this, when `path` exists, and while another process writes the share of this rank. The number of processes may
        differ from run to run.
        """
        check_number(k, "k", minimum=1, maximum=vocab_size, integer=True)
        check_number(temperature, "temperature", minimum=0, exclusive=True)
        if not len(source) == len(target) == len(lengths):
            raise ValueError(
                f"source, target and lengths must be of one length; got {len(source)}, {len(target)}, {len(lengths)}"
            )
        path = Path(path)
        if path.exists():
            raise ValueError(f"output {path} exists; use another, or delete it to begin again")
        check_writable(path)
        starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
        header = {
            "version": VERSION, "k": k, "vocab_size": vocab_size, "temperature": float(temperature), "teacher": teacher,
            "vocabulary": vocabulary, "lines": len(target), "tokens": int(starts[-1]), "source": text_digest(source),
            "target": text_digest(target), "starts": zlib.crc32(starts.astype("<u8")),
        }  # fmt: skip
        parts = path.with_name(path.name + ".parts")
        parts.mkdir(exist_ok=True)
        begun = parts / "store.json"
        if begun.exists():
            found = json.loads(begun.read_bytes())
            for name in header:
                if found.get(name) != header[name]:
                    raise ValueError(
                        f"teacher store {parts} was begun with {name} {found.get(name)!r}; got {header[name]!r};"
                        " use another output, or delete the folder to begin again"
                    )
        else:  # processes that start together write the same bytes
            write_atomically(begun, [json.dumps(header, indent=2).encode() + b"\n"])
        return cls(parts, header, starts, rank, world_size)

    def __enter__(self) -> TeacherStoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def missing(self) -> list[int]:
        """Lines (from 0, ascending) of this process's share, rank, rank + world_size, …, that are not stored yet."""
        return [i for i in range(self.rank, self.header["lines"], self.world_size) if not self._done[i]]

    def append(self, lines: Sequence[int], ids: Tensor, log_probs: Tensor) -> None:
        """Store ids and log_probs [n, k] of all tokens of these lines, in order; on disk when it returns.

        A process that is killed here leaves the lines missing.
        """
        lines = np.asarray(lines, dtype=np.int64)
        tokens = int(self.lengths[lines].sum())
        if ids.shape != (tokens, self.records.k) or log_probs.shape != ids.shape:
            raise ValueError(
                f"ids and log_probs must have shape [{tokens}, {self.records.k}]; got {list(ids.shape)} and"
                f" {list(log_probs.shape)}"
            )
        data = self.records.encode(ids, log_probs)
        first, base, checksums = 0, _first_record(self.header["lines"]), []
        with open(self._file, "r+b", buffering=0) as file:
            for line in lines.tolist():
                part = data[first : first + self.lengths[line]]
                first += len(part)
                checksums.append(zlib.crc32(part))
                file.seek(base + int(self.starts[line]) * self.records.size)
                _write_all(file, part.tobytes())
            os.fsync(file.fileno())
        entry = json.dumps({"lines": lines.tolist(), "checksums": checksums}).encode()
        with open(self._journal, "ab", buffering=0) as file:
            _write_all(file, b"\n" + entry + b"\n")  # the first newline closes an entry that was cut off
            os.fsync(file.fileno())
        self._done[lines] = True

    def finish(self, path: str | Path) -> None:
        """Complete the file and give it its name; ValueError while lines of any process's share are missing."""
        checksums = np.zeros(self.header["lines"], "<u4")
        done = self.lengths == 0
        for lines, found in self._entries():
            checksums[lines] = found
            done[lines] = True
        if not done.all():
            first = int(np.flatnonzero(~done)[0]) + 1
            raise ValueError(
                f"teacher store {self.parts} is not complete: {int((~done).sum())} of {len(done)} lines are missing,"
                f" the first of them line {first}"
            )
        index = self.starts.astype("<u8").tobytes() + checksums.tobytes()
        index += b"\0" * (_first_record(self.header["lines"]) - HEADER_BYTES - len(index))
        body = json.dumps(self.header | {"index": zlib.crc32(index)}).encode()
        body += b"\0" * (HEADER_BYTES - len(MAGIC) - 4 - len(body))
        with open(self._file, "r+b", buffering=0) as file:
            _write_all(file, MAGIC + zlib.crc32(body).to_bytes(4, "little") + body + index)
            os.fsync(file.fileno())
        os.replace(self._file, path)
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
        shutil.rmtree(self.parts)

    def _entries(self) -> Iterator[tuple[list[int], list[int]]]:
        """(lines, checksums) of every whole entry of every process's journal."""
        for journal in sorted(self.parts.glob("rank-*.done")):
            for line in journal.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    yield entry["lines"], entry["checksums"]
                except (ValueError, KeyError, TypeError):
                    continue


def _first_record(lines: int) -> int:
    """Where records begin: after the header and the index, at a multiple of 64."""
    return HEADER_BYTES + -(-(8 * (lines + 1) + 4 * lines) // 64) * 64


def _write_all(file, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += file.write(data[written:])
