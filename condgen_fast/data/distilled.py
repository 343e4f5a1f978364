"""The store of a distilled corpus: a teacher's output for every line of a source text, filled in by any number of
processes over any number of runs.

A store is a folder. `store.json` says what it is a translation of and how it is made; `rank-<r>.jsonl` holds what
process r did, one record a batch, appended and flushed to disk. Processes share nothing else. A record that was cut
off by a kill or a full disk is not read, and its sentences are done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from condgen_fast.data.files import write_atomically
from condgen_fast.data.text import write_lines


class DistilledCorpus:
    """An open store; `open` makes one."""

    def __init__(self, path: Path, lines: int, rank: int, world_size: int):
        self.path, self.lines, self.rank, self.world_size = path, lines, rank, world_size
        self._shard = path / f"rank-{rank}.jsonl"
        self._done = np.zeros(lines, dtype=bool)
        for indices, _ in self._records():
            self._done[indices] = True

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        sources: Sequence[str],
        description: Mapping[str, object],
        rank: int = 0,
        world_size: int = 1,
    ) -> DistilledCorpus:
        """Open a store, making it when it is not there.

        `description` says how the texts are made, in values that JSON can hold: the teacher's fingerprint, the
        strategy and its options. Raises ValueError when the store was begun from another source text or with another
        description. The number of processes may differ from run to run.
        """
        if isinstance(sources, str):
            raise TypeError("sources must be a list of str; got str")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}); got {rank}")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for line in sources:
            digest.update(line.encode("utf-8") + b"\n")
        # Through JSON and back: what is compared is what would be read.
        wanted = json.loads(
            json.dumps({"lines": len(sources), "source": digest.hexdigest(), "description": dict(description)})
        )
        header = path / "store.json"
        if header.exists():
            _check_same(path, _read_header(header), wanted)
        else:  # processes that start together write the same bytes
            write_atomically(header, [json.dumps(wanted, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"])
        return cls(path, len(sources), rank, world_size)

    def missing(self) -> list[int]:
        """Places (from 0, ascending) of this process's share of the source lines that have no text yet.

        Process r has the lines r, r + world_size, …
        """
        return [i for i in range(self.rank, self.lines, self.world_size) if not self._done[i]]

    def append(self, indices: Sequence[int], texts: Sequence[str]) -> None:
        """Store the texts of these source lines; when it returns they are on disk.

        On an error (a full disk) none of them is stored, and all that was stored before stays.
        """
        indices, texts = [int(i) for i in indices], list(texts)
        if len(indices) != len(texts):
            raise ValueError(f"indices and texts must have the same length; got {len(indices)} and {len(texts)}")
        for i, text in zip(indices, texts, strict=True):
            if not 0 <= i < self.lines:
                raise ValueError(f"indices must be in [0, {self.lines}); got {i}")
            if "\n" in text or text.endswith("\r"):
                raise ValueError(f"texts must not hold a line break; got {text[:60]!r} for line {i + 1}")
        if not indices:
            return
        record = json.dumps({"indices": indices, "texts": texts}, ensure_ascii=False).encode("utf-8") + b"\n"
        with open(self._shard, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    record = b"\n" + record  # closes a record that was cut off
            written = 0
            while written < len(record):
                written += file.write(record[written:])
            os.fsync(file.fileno())
        self._done[indices] = True

    def finish(self, output_path: str | Path) -> None:
        """Write all texts to a file line-aligned with the source, whole or not at all.

        Raises ValueError while lines are missing in any process's share. The store stays as it is.
        """
        texts: list[str | None] = [None] * self.lines
        for indices, found in self._records():
            for i, text in zip(indices, found, strict=True):
                texts[i] = text
        if missing := [i for i, text in enumerate(texts) if text is None]:
            raise ValueError(
                f"distilled corpus {self.path} is not complete: {len(missing)} of {self.lines} lines are missing,"
                f" the first of them line {missing[0] + 1}"
            )
        write_lines(output_path, [text for text in texts if text is not None])

    def _records(self) -> Iterator[tuple[list[int], list[str]]]:
        """(indices, texts) of every whole record of every process, in the order they were stored by each."""
        for shard in sorted(self.path.glob("rank-*.jsonl")):
            with open(shard, "rb") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                        indices, texts = record["indices"], record["texts"]
                        whole = len(indices) == len(texts) and all(0 <= i < self.lines for i in indices)
                    except (ValueError, TypeError, KeyError):
                        continue
                    if whole:
                        yield indices, texts


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(header, dict) or not {"lines", "source", "description"} <= header.keys():
        raise ValueError(f"{path} is not the header of a distilled corpus")
    return header


def _check_same(path: Path, found: dict, wanted: dict) -> None:
    advice = "use another output, or delete the folder to begin again"
    if found["lines"] != wanted["lines"]:
        raise ValueError(
            f"distilled corpus {path} is of a source text of {found['lines']} lines;"
            f" got one of {wanted['lines']}; {advice}"
        )
    if found["source"] != wanted["source"]:
        raise ValueError(f"distilled corpus {path} is of another source text of as many lines; {advice}")
    for name in sorted(found["description"].keys() | wanted["description"].keys()):
        before, now = found["description"].get(name), wanted["description"].get(name)
        if before != now:
            raise ValueError(f"distilled corpus {path} was begun with {name} {before!r}; got {now!r}; {advice}")
