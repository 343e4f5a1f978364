"""Line-aligned corpora built from Debian packages, about two minutes for all of them and 50 MB to fetch.

  condgen-fast corpus --tasks en-de
  condgen-fast corpus --tasks libreoffice-en-de headline --output corpus --work corpus-work

Writes OUTPUT/<task>/{train,valid,test}.<language>, one sentence a line, and beside them .meta (source and group of
each line); OUTPUT/stats.json counts and hashes every split. The same packages give the same bytes.

Licences: LibreOffice help MPL-2.0, the Ding dictionary GPL-2+; the translations of package descriptions state none,
so a corpus with them, and a model trained on it, is not to be passed on.
"""

from __future__ import annotations

import collections
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from condgen_fast.data.debian import Unit, descriptions, ding, libreoffice_help
from condgen_fast.data.debian.packages import Packages, fetch
from condgen_fast.data.files import write_atomically
from condgen_fast.data.held_out import Split, split
from condgen_fast.data.sentences import Row, aligned_rows
from condgen_fast.data.text import write_lines


@dataclass(frozen=True)
class Task:
    """What a corpus is made of."""

    languages: tuple[str, ...]
    """the sides, the source side first"""
    sources: tuple[str, ...]
    """lo (LibreOffice help), ddtp (package descriptions), ding (dictionary); equal sentences are the first source's"""
    only: str | None = None
    """after splitting, keep the rows of this source alone"""


TASKS = {
    "modes-de-es-fr": Task(("en", "de", "es", "fr"), ("lo", "ddtp")),
    "modes-de-fr-it": Task(("en", "de", "fr", "it"), ("lo", "ddtp")),
    "modes-da-fr-it": Task(("en", "da", "fr", "it"), ("ddtp",)),
    "en-de": Task(("en", "de"), ("lo", "ddtp", "ding")),
    "libreoffice-en-de": Task(("en", "de"), ("lo", "ddtp", "ding"), only="lo"),
    "en-it": Task(("en", "it"), ("lo", "ddtp")),
    "headline": Task(("src", "tgt"), ("ddtp",)),
}
"""modes-*: one English side with three target languages. libreoffice-en-de is the part of en-de that may be passed on,
held out alike. headline: long package description, one-line synopsis."""


@dataclass(kw_only=True)
class Corpus:
    """Build corpora from Debian packages."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """which: modes-de-es-fr, modes-de-fr-it, modes-da-fr-it, en-de, libreoffice-en-de, en-it, headline"""
    output: Path = Path("corpus")
    """folder of the corpora"""
    work: Path = Path("corpus-work")
    """folder of what is fetched; a second run finds it there"""
    held: int = 1000
    """validation and test lines at most, each"""
    offline: bool = False
    """use what `work` holds and fetch nothing"""


def main(options: Corpus) -> None:
    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    build(options.output, options.work, options.tasks, held=options.held, offline=options.offline, report=report)


def build(
    output: str | Path,
    work: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    *,
    held: int = 1000,
    offline: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """Fetch what these tasks need into `work`, write their corpora under `output` -> counts and hashes by task.

    Raises ValueError for an unknown task, RuntimeError where there is no apt or apt fails.
    """
    for name in tasks:
        if name not in TASKS:
            nearest = get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            raise ValueError(f"tasks must be of {', '.join(TASKS)}; got {name!r}; did you mean {nearest!r}?")
    if held < 1:
        raise ValueError(f"held must be at least 1; got {held}")
    output = Path(output)
    report(f"fetching packages into {work}")
    packages = fetch(work, _packages(tasks), _languages(tasks), offline=offline)
    texts = _Texts(packages, _languages(tasks))
    stats = {}
    for name in tasks:
        report(f"{name}: reading and splitting")
        task = TASKS[name]
        rows = texts.rows(name)
        parts = split(rows, held)
        if task.only is not None:
            train, valid, test = ([r for r in part if r.source == task.only] for part in parts[:3])
            parts = parts._replace(train=train, valid=valid, test=test)
        stats[name] = _write(output / name, task.languages, parts, len(rows))
        counts = " / ".join(str(stats[name][part]) for part in ("train", "valid", "test"))
        report(f"{name}: {counts} train / valid / test lines in {output / name}")
    path = output / "stats.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, [json.dumps(known | stats, indent=1).encode("utf-8") + b"\n"])
    return stats


class _Texts:
    """What was fetched, each source read once, when the first task asks for it."""

    def __init__(self, packages: Packages, languages: Sequence[str]):
        self.packages, self.languages = packages, languages
        self._units: dict[str, list[Unit]] = {}
        self._descriptions: descriptions.Descriptions | None = None

    def rows(self, name: str) -> list[Row]:
        """Rows of a task before splitting."""
        task = TASKS[name]
        if name == "headline":
            return [Row(u.source, u.group, (u.text["src"], u.text["tgt"])) for u in self._read("headline")]
        return aligned_rows((unit for source in task.sources for unit in self._read(source)), task.languages)

    def _read(self, source: str) -> list[Unit]:
        if source not in self._units:
            self._units[source] = list(self._reader(source))
        return self._units[source]

    def _reader(self, source: str) -> Iterable[Unit]:
        if source == "lo":
            return libreoffice_help.units(self.packages, [x for x in self.languages if x in libreoffice_help.LANGUAGES])
        if source == "ding":
            return ding.units(self.packages)
        if self._descriptions is None:
            self._descriptions = descriptions.read(self.packages, self.languages)
        return (descriptions.units if source == "ddtp" else descriptions.headlines)(self._descriptions)


def _languages(tasks: Sequence[str]) -> list[str]:
    """Languages of these tasks, English first."""
    found = {language for name in tasks for language in TASKS[name].languages} - {"en", "src", "tgt"}
    return ["en", *sorted(found)]


def _packages(tasks: Sequence[str]) -> list[str]:
    """Packages that these tasks are read from; descriptions come with the package index."""
    found = []
    for task in (TASKS[name] for name in tasks):
        if "lo" in task.sources:
            found += [libreoffice_help.package(language) for language in task.languages]
        if "ding" in task.sources:
            found.append(ding.PACKAGE)
    return sorted(set(found))


def _write(folder: Path, languages: Sequence[str], parts: Split, unique: int) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    stats = {
        "unique_before_split": unique,
        "near_dup_train_dropped": parts.near_duplicates,
        "template_held_dropped": parts.templates,
        "sha256": {},
    }
    for name in ("train", "valid", "test"):
        rows: list[Row] = getattr(parts, name)
        for side, language in enumerate(languages):
            write_lines(folder / f"{name}.{language}", [row.text[side] for row in rows])
        write_lines(folder / f"{name}.meta", [f"{row.source}\t{row.group}" for row in rows])
        stats[name] = len(rows)
        stats["sha256"][name] = hashlib.sha256(repr([row.text for row in rows]).encode()).hexdigest()[:16]
    train = parts.train
    stats["words_per_line"] = {
        language: round(sum(len(row.text[side].split()) for row in train) / max(len(train), 1), 1)
        for side, language in enumerate(languages)
    }
    stats["train_sources"] = dict(collections.Counter(row.source for row in train))
    return stats
