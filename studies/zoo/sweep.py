"""Every kind of network of torchvision and timm: compiled, searched, saved and loaded.

python studies/zoo/sweep.py --out studies/zoo/zoo.csv [--only PATTERN] [--again OUTCOME]
python studies/zoo/sweep.py --out studies/zoo/zoo.csv --table
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import networks

COLUMNS = (
    *("entry", "network", "input", "params", "layers", "macs_covered", "params_covered"),
    *(
        "outcome",
        "message",
        "norm",
        "macs_kept",
        "difference",
        "compile_s",
        "search_s",
        "save_load_s",
    ),
    "dense",
)
LOW = 0.5  # share of MACs under which a network is listed with its reasons
Row = Mapping[str, str]


def run(entry: str, seconds: float) -> dict[str, str]:
    """The row of one network, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, str(Path(__file__).with_name("attempt.py")), entry, str(out)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        one_thread["RANKNAS_CACHE"] = folder
        try:
            code = subprocess.run(command, env=one_thread, timeout=seconds).returncode
            message = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            message = f"not ready after {seconds:g} seconds"
        if out.exists():
            return {name: str(value) for name, value in json.loads(out.read_text()).items()}
    return {"entry": entry, "outcome": "failed", "message": message}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a table in the order of the entries."""
    order = {entry: i for i, entry in enumerate(networks.names())}
    ready = sorted(rows, key=lambda row: order.get(row["entry"], len(order)))
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(ready)
    new.replace(path)


def sweep(path: Path, entries: Sequence[str], processes: int, seconds: float) -> None:
    """Run the entries and write each row as it is ready."""
    lock = Lock()

    def one(entry: str) -> None:
        row = run(entry, seconds)
        with lock:
            others = [other for other in read(path) if other["entry"] != entry]
            write(path, [*others, row])
            print(*(row.get(name, "") for name in COLUMNS[:-1]), sep=" | ", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, entries))


def summary(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    lines = ["| | networks | work | refused | failed | median share of MACs covered |"]
    lines.append("|---|---|---|---|---|---|")
    groups = {"torchvision": "torchvision:", "timm": "timm:", "all": ""}
    for title, prefix in groups.items():
        part = [row for row in rows if row["entry"].startswith(prefix)]
        counts = [sum(r["outcome"] == o for r in part) for o in ("works", "refused", "failed")]
        shares = sorted(float(r["macs_covered"]) for r in part if r["outcome"] == "works")
        median = f"{shares[len(shares) // 2]:.3f}" if shares else ""
        lines.append(f"| {title} | {len(part)} | {' | '.join(map(str, counts))} | {median} |")
    low = [r for r in rows if r["outcome"] == "works" and float(r["macs_covered"]) < LOW]
    lines += ["", f"Under {LOW} of the MACs:", ""]
    lines += [f"- {_title(r)}, {float(r['macs_covered']):.3f}: {r['dense']}" for r in low]
    for outcome in ("refused", "failed"):
        lines += ["", f"{outcome.capitalize()}:", ""]
        lines += [f"- {_title(r)}: {r['message']}" for r in rows if r["outcome"] == outcome]
    return "\n".join(lines)


def _title(row: Row) -> str:
    return f"`{row['entry']}` ({row['network']})" if row["network"] else f"`{row['entry']}`"


def main() -> None:
    """Run what is missing, then print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="a regular expression for entries")
    parser.add_argument("--again", default="", help="run the rows with this outcome again; or all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--table", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.table:
        done = {
            row["entry"] for row in read(given.out) if given.again not in ("all", row["outcome"])
        }
        entries = [e for e in networks.names() if e not in done and re.search(given.only, e)]
        sweep(given.out, entries, given.processes, given.seconds)
    print(summary(read(given.out)))


if __name__ == "__main__":
    main()
