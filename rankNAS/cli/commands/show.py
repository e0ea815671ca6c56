"""``ranknas show``."""

from __future__ import annotations

from typing import Any

import typer

from rankNAS.cli.options.stored import study_folder
from rankNAS.cli.options.studies import ShowOptions
from rankNAS.cli.output import number, percent, print_json, print_table
from rankNAS.cli.results import load_result
from rankNAS.reporting.metrics import metric_name, metric_text, quality_names

__all__ = ["run_show"]

Document = dict[str, Any]


def run_show(options: ShowOptions) -> None:
    """Print a study's solution for each budget, its best trials and the chosen ranks."""
    result = load_result(study_folder(options.study, options.out))
    if options.json:
        print_json(result)
        return
    trials = result["trials"]
    failed = sum(t["state"] != "complete" for t in trials)
    probes = sum(t["probe"] for t in trials)
    typer.echo(
        f"{result['study']}: {result['space']} by {result['strategy']}, "
        f"{len(trials) - probes} trials"
        + f" and {probes} probes, measured whatever their cost" * bool(probes)
        + f", {failed} failed" * bool(failed)
    )
    for note in result.get("notes", []):
        typer.echo(note)
    for solution in result["solutions"]:
        _print_solution(result, solution)
        _print_trials(result, solution, options.top)
        _print_layers(solution)


def _print_solution(result: Document, solution: Document) -> None:
    dense, best, metric = result["dense"], solution["best"], quality_names(result)[-1]
    trial = solution["trial"]
    chosen = "the uniform allocation, no trial" if trial is None else f"trial {trial}"
    typer.echo(f"\n{solution['budget_key'] if solution['budget'] else 'no budget'}: {chosen}")
    tuned = solution.get("finetuned")
    typer.echo(
        f"{metric_name(metric)} {metric_text(best[metric])} (dense {metric_text(dense[metric])}"
        + (f", fine-tuned {metric_text(tuned[metric])}" if tuned else "")
        + f"), MACs {percent(best, dense, 'macs')}, params {percent(best, dense, 'params')}"
    )
    if "hypervolume" in solution:
        pairs = zip(result["objectives"], solution["reference"], strict=True)
        worst = ", ".join(f"{name} {value:.5g}" for name, value in pairs)
        typer.echo(
            f"Pareto front of {len(solution['pareto_front'])} trials, hypervolume "
            f"{solution['hypervolume']:.5g} from the worst values seen ({worst})"
        )


def _print_trials(result: Document, solution: Document, top: int) -> None:
    """Print the trials within the budget, without probes that were not chosen."""
    names, front, several = (
        result["objectives"],
        solution["pareto_front"],
        "hypervolume" in solution,
    )
    sign = 1 if result["directions"][0] == "maximize" else -1
    trials = {t["number"]: t for t in result["trials"]}
    listed = [
        trials[n]
        for n in solution["feasible"]
        if not trials[n]["probe"] or n in front or n == solution["trial"]
    ]
    # The chosen trial comes first among equals.
    listed.sort(
        key=lambda t: (
            several and t["number"] not in front,
            -sign * t["values"][0],
            t["number"] != solution["trial"],
        )
    )
    rows = []
    for t in listed[:top]:
        row = [t["number"], *(f"{v:.5g}" for v in t["values"])]
        row += [percent(t["metrics"], result["dense"], "macs"), f"{t['seconds']:.1f}"]
        if several:
            by = solution["dominated_by"].get(str(t["number"]))
            row.append("*" if by is None else f"dominated by {by}")
        rows.append(row)
    columns = ["trial", *names, "MACs", "seconds", *(["front"] if several else [])]
    print_table(f"best {len(rows)} of {len(listed)} trials", columns, rows, left=0)


def _print_layers(solution: Document) -> None:
    rows = [
        (
            name,
            solution["best"]["allocation"][name],
            number(costs["macs"]),
            f"{100 * costs['best_macs'] / costs['macs']:.1f} %",
        )
        for name, costs in solution["layers"].items()
    ]
    print_table("chosen ranks", ("layer", "choice", "dense MACs", "kept"), rows, left=2)
