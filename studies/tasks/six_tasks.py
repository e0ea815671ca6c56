"""Strategies on tasks that are not image classification.

python studies/tasks/six_tasks.py regression10 [--seeds 3] [--out FILE.csv]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from problems import PROBLEMS, Problem
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.data.samples import Samples

STRATEGIES = ("uniform", "solve", "auto")
BUDGETS = (0.5, 0.3)
TRIALS = 4


def rows_of(problem: Problem, seed: int) -> list[dict[str, object]]:
    """One row for the dense network and for each strategy and budget."""
    network, (train, test) = problem.trained(seed)
    searched: object = (train, test)
    if not problem.labelled:
        searched = TensorDataset(train.tensors[0])
    held_out = Samples.of(test)
    task = problem.task.bound(held_out.example(2), network)
    rows: list[dict[str, object]] = []
    for strategy in STRATEGIES:
        study = rankNAS.search(
            network,
            searched,  # type: ignore[arg-type]
            budget=[{"macs": budget} for budget in BUDGETS],
            strategy=strategy,
            n_trials=TRIALS,
            seed=seed,
        )
        if not rows:
            print(f"task: {study.task.describe()}")
            value = _measured(network, held_out, task, problem.metric)
            rows.append({"strategy": "dense", "budget": 1.0, "seed": seed, "value": value})
        for found, budget in zip(study.problems, BUDGETS, strict=True):
            small = study.materialise(study.solution(found).allocation)
            value = _measured(small, held_out, task, problem.metric)
            rows.append({"strategy": strategy, "budget": budget, "seed": seed, "value": value})
    return rows


def _measured(
    network: torch.nn.Module, samples: Samples, task: rankNAS.Task, metric: str
) -> float:
    from rankNAS.evaluation.outputs import network_metrics

    return network_metrics(network, samples, task)[metric]


def table(problem: Problem, rows: pd.DataFrame) -> str:
    """Means and sample standard deviations over seeds, in Markdown."""
    found = rows.groupby(["strategy", "budget"], sort=False).value.agg(["mean", "std"])

    def cell(strategy: str, budget: float) -> str:
        mean, spread = found.loc[(strategy, budget)]
        return f"{mean:.4f} ± {spread:.4f}"

    lines = [f"{problem.title}: {problem.metric}, dense {cell('dense', 1.0)}", ""]
    lines += ["| | " + " | ".join(f"MACs {b:g}" for b in BUDGETS) + " |", "|---|---|---|"]
    for strategy in STRATEGIES:
        cells = " | ".join(cell(strategy, budget) for budget in BUDGETS)
        lines.append(f"| `{strategy}` | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Train, search, test and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    problem = PROBLEMS[given.problem]
    rows = pd.DataFrame([r for seed in range(given.seeds) for r in rows_of(problem, seed)])
    if given.out is not None:
        rows.to_csv(given.out, index=False)
    print(table(problem, rows))


if __name__ == "__main__":
    main()
