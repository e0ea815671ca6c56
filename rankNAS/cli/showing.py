"""``ranknas show`` and ``ranknas dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from rankNAS.cli.options import read_options, study_folder
from rankNAS.cli.output import number, percent, print_json, print_table
from rankNAS.cli.searching import load_result
from rankNAS.exceptions import UsageError

__all__ = ["run_dashboard", "run_show"]


def run_show(study: str, out: str, top: int, *, as_json: bool) -> None:
    """Print a study's result, its best trials and the chosen ranks."""
    folder = study_folder(study, out)
    result = load_result(folder)
    if as_json:
        print_json(result)
        return
    dense, best = result["dense"], result["best"]
    bounds = ", ".join(f"{k} <= {v:g}" for k, v in result["budget"].items()) or "no budget"
    typer.echo(f"{result['study']}: {result['space']} by {result['strategy']}, {bounds}")
    typer.echo(
        f"test accuracy {best['test_accuracy']:.4f} (dense {dense['test_accuracy']:.4f}), "
        f"MACs {percent(best, dense, 'macs')}, params {percent(best, dense, 'params')}"
    )
    _print_trials(result, folder, top)
    _print_layers(result)


def _print_trials(result: dict[str, Any], folder: Path, top: int) -> None:
    names = [name.partition("=")[0] for name in read_options(folder).objective]
    front = set(result["pareto_front"])
    complete = [t for t in result["trials"] if t["state"] == "complete"]
    ordered = sorted(complete, key=lambda t: (t["number"] not in front, -t["values"][0]))
    if len(names) == 1:
        best = result["best"]
        ordered.sort(key=lambda t: abs(t["values"][0] - best.get(names[0], t["values"][0])))
    rows = [
        (
            t["number"],
            *(f"{v:.5g}" for v in t["values"]),
            percent(t["metrics"], result["dense"], "macs"),
            f"{t['seconds']:.1f}",
            "*" if t["number"] in front else "",
        )
        for t in ordered[:top]
    ]
    columns = ["trial", *(n.rpartition(":")[2] for n in names), "MACs", "seconds", "front"]
    failed = len(result["trials"]) - len(complete)
    title = f"best {len(rows)} of {len(complete)} trials" + (f", {failed} failed" * bool(failed))
    print_table(title, columns, rows, left=0)


def _print_layers(result: dict[str, Any]) -> None:
    rows = [
        (
            name,
            result["best"]["allocation"][name],
            number(costs["macs"]),
            f"{100 * costs['best_macs'] / costs['macs']:.1f} %",
        )
        for name, costs in result["layers"].items()
    ]
    print_table("chosen ranks", ("layer", "choice", "dense MACs", "kept"), rows, left=2)


def run_dashboard(study: str, out: str, host: str, port: int) -> None:
    """Serve optuna-dashboard on the study's storage until interrupted."""
    options = read_options(study_folder(study, out))
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise UsageError(
            "`ranknas dashboard` needs optuna-dashboard: pip install 'ranknas[dashboard]'"
        ) from None
    typer.echo(f"http://{host}:{port}/  (Ctrl-C ends)", err=True)
    run_server(options.storage_url, host=host, port=port)
