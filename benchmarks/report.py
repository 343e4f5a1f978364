"""Turn a run of the benchmarks into benchmarks/results/NAME.csv and Markdown tables.

  pytest benchmarks --benchmark-json=run.json
  python benchmarks/report.py run.json --machine NAME

The cases that the run measured replace their rows in the file; the others stay. Tables show all of the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

CASE = ("op", "case", "device", "threads", "malloc")
MEASURED = ("median_ms", "q1_ms", "q3_ms", "ratio_to_ours", "ratio_q1", "ratio_q3")
COLUMNS = (*CASE, "implementation", "role", *MEASURED, "rounds", "torch", "commit", "cpu", "date")
NOTHING = "not measured"

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--machine", required=True, help="name of the file in benchmarks/results, without .csv")
    options = parser.parse_args()
    path = Path(__file__).parent / "results" / f"{options.machine}.csv"
    rows = merged(read(path), measured(json.loads(options.run.read_text(encoding="utf-8"))))
    write(path, rows)
    print(tables(rows))


def measured(run: dict[str, Any]) -> list[Row]:
    """The rows of a run: of each case ours, then the peers, then the floor."""
    commit = run["commit_info"].get("id", "")[:12] + ("+" if run["commit_info"].get("dirty") else "")
    common = {"commit": commit, "cpu": run["machine_info"].get("cpu", {}).get("brand_raw", ""), "date": run["datetime"]}
    rows = []
    for benchmark in run["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        case = {name: str(info[name]) for name in (*CASE, "torch")}
        case |= common | {"rounds": str(stats["rounds"]), "date": common["date"][:10]}
        milliseconds = [f"{1000 * stats[name]:.6g}" for name in ("median", "q1", "q3")]
        ours = dict(zip(MEASURED, [*milliseconds, "1", "1", "1"], strict=True))
        rows.append(case | {"implementation": "ours", "role": "ours"} | ours)
        for other in info["others"]:
            values = {"median_ms": NOTHING}
            if "ratio" in other:
                names = ("median_ms", "q1_ms", "q3_ms", "ratio", "ratio_q1", "ratio_q3")
                values = {column: f"{other[name]:.6g}" for column, name in zip(MEASURED, names, strict=True)}
            rows.append(case | {"implementation": other["implementation"], "role": other["role"]} | values)
    return [{column: row.get(column, "") for column in COLUMNS} for row in rows]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows of cases that were not measured anew, and the new ones; by case, the rows of a case as they came."""
    again = {key(row) for row in new}
    rows = [row for row in old if key(row) not in again] + new
    return sorted(rows, key=lambda row: [natural(text) for text in key(row)])


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts numbers in a text by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def tables(rows: list[Row]) -> str:
    """A Markdown table per op; its columns: our time, how often it fits into each peer's, and the floor into it."""
    text = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        settings = sorted({setting(row) for row in of_op}, key=lambda s: (s[0] != "cpu", s[2] == "default", s))
        cases = {case: [""] for case in dict.fromkeys(row["case"] for row in of_op)}
        header = ["case"]
        for where in settings:
            here = [row for row in of_op if setting(row) == where]
            names = {(row["role"], row["implementation"]): row for row in here}
            header += [title(where, settings), *(heading(*name) for name in names if name[0] != "ours")]
            found = {(row["case"], row["role"], row["implementation"]): row for row in here}
            for case, cells in cases.items():
                cells += [cell(found.get((case, *name))) for name in names]
        if all(where[0] == "cpu" for where in settings):
            header.append("GPU: ours, ms")
            for cells in cases.values():
                cells.append(NOTHING)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *([case, *cells[1:]] for case, cells in cases.items())]
        text.append(f"### {op}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    sources = {f"torch {row['torch']}, commit {row['commit']}, {row['date']}, {row['cpu']}" for row in rows}
    mallocs = {f"malloc: {row['malloc']}" for row in rows}
    return "\n\n".join([*text, "\n".join(sorted(sources) + sorted(mallocs))])


def setting(row: Row) -> tuple[str, str, str]:
    return row["device"], row["threads"], row["malloc"]


def title(where: tuple[str, str, str], settings: list[tuple[str, str, str]]) -> str:
    device, threads, malloc = where
    name = f"CPU, {threads} thread{'s' * (threads != '1')}" if device == "cpu" else device
    several = len({s[2] for s in settings if s[0] == device}) > 1
    return f"{name}{', default malloc' if several and malloc == 'default' else ''}: ours, ms"


def heading(role: str, implementation: str) -> str:
    return f"× the floor, {implementation}" if role == "floor" else f"× faster than {implementation}"


def cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["median_ms"] == NOTHING:
        return NOTHING
    if row["role"] == "ours":
        return f"{float(row['median_ms']):.3g}"
    ratio = float(row["ratio_to_ours"])
    return f"{1 / ratio if row['role'] == 'floor' else ratio:.2f}"


if __name__ == "__main__":
    main()
