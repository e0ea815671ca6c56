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
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import attempt
import chosen

COLUMNS = (
    *("entry", "network", "input", "params", "layers", "macs_covered", "params_covered"),
    *("outcome", "message", "searched", "macs_kept", "difference"),
    *("compile_s", "search_s", "save_load_s", "dense"),
)
OUTCOMES = ("works", "compiled", "refused", "failed")
LOW = 0.5  # share of MACs under which a network is listed with its reasons
Row = Mapping[str, str]


def _started(entry: str, folder: str, seconds: float, compile_only: bool) -> BaseProcess:
    """A process that writes the row of one network to a folder."""
    # A forked process has the packages loaded: importing them takes as long as a small network.
    given = (entry, _row_file(folder, entry), seconds, compile_only)
    process = get_context("fork").Process(target=attempt.main, args=given)
    process.start()
    return process


def _row_file(folder: str, entry: str) -> Path:
    return Path(folder) / f"{entry}.json"


def _row(entry: str, file: Path, message: str) -> dict[str, str]:
    """The row that a process wrote; if it wrote none, a row with a message."""
    if file.exists():
        return {name: str(value) for name, value in json.loads(file.read_text()).items()}
    return {"entry": entry, "outcome": "failed", "message": message}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a table in the order of the entries."""
    order = {entry: i for i, entry in enumerate(chosen.names())}
    ready = sorted(rows, key=lambda row: order.get(row["entry"], len(order)))
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(ready)
    new.replace(path)


def sweep(
    path: Path, entries: Sequence[str], processes: int, seconds: float, compile_only: bool
) -> None:
    """Run the entries, each in a process of its own, and write each row as it is ready."""
    waiting, running = list(entries), dict[str, tuple[BaseProcess, float]]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RANKNAS_CACHE"] = folder
        while waiting or running:
            while waiting and len(running) < processes:
                entry = waiting.pop(0)
                running[entry] = _started(entry, folder, seconds, compile_only), time.monotonic()
            time.sleep(0.2)
            for entry, (process, since) in list(running.items()):
                late = time.monotonic() - since > seconds + 10
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                del running[entry]
                message = f"the process ended with code {process.exitcode}"
                if late:
                    message = f"not ready after {seconds:g} seconds"
                row = _row(entry, _row_file(folder, entry), message)
                write(path, [*(r for r in read(path) if r["entry"] != entry), row])
                print(*(row.get(name, "") for name in COLUMNS[:-1]), sep=" | ", flush=True)


def summary(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    lines = [
        "| | networks | work | compiled only | refused | failed | median share of MACs covered |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    groups = {"torchvision": "torchvision:", "timm": "timm:", "all": ""}
    for title, prefix in groups.items():
        part = [row for row in rows if row["entry"].startswith(prefix)]
        counts = [sum(r["outcome"] == o for r in part) for o in OUTCOMES]
        shares = [float(r["macs_covered"]) for r in part if r["macs_covered"]]
        middle = f"{median(shares):.3f}" if shares else ""
        lines.append(f"| {title} | {len(part)} | {' | '.join(map(str, counts))} | {middle} |")
    low = [r for r in rows if r["macs_covered"] and float(r["macs_covered"]) < LOW]
    lines += ["", f"Under {LOW} of the MACs:", ""]
    lines += [f"- {_title(r)}, {float(r['macs_covered']):.3f}: {r['dense']}" for r in low]
    for outcome in ("refused", "failed"):
        found = [f"- {_title(r)}: {r['message']}" for r in rows if r["outcome"] == outcome]
        lines += ["", f"{outcome.capitalize()}:", "", *found] if found else []
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
    parser.add_argument("--compile-only", action="store_true", help="no searches")
    parser.add_argument("--table", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.table:
        done = {
            row["entry"] for row in read(given.out) if given.again not in ("all", row["outcome"])
        }
        entries = [e for e in chosen.names() if e not in done and re.search(given.only, e)]
        sweep(given.out, entries, given.processes, given.seconds, given.compile_only)
    print(summary(read(given.out)))


if __name__ == "__main__":
    main()
