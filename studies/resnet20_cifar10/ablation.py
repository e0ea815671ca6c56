"""What each part of `auto` is worth on ResNet-20, without any training.

    python studies/resnet20_cifar10/ablation.py --data parquet:DIR --weights FILE --out FOLDER

Each row of FOLDER/ablation.csv is one answer, written when it is known; rows that are there are
not searched again. FOLDER/ablation.md is made from them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
from torch import nn

import rankNAS
from rankNAS.data import Data, normalization_from_metadata
from rankNAS.engine import prepare, run
from rankNAS.evaluation import Evaluator
from rankNAS.objectives import make_objective
from rankNAS.record import Record
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo import build_model
from rankNAS.strategies import Auto, Energy, Problem, Solve, Strategy
from rankNAS.study import Study
from rankNAS.weights import load_weights, peek_metadata
from rankNAS.workbench import Workbench

BUDGETS = (0.7, 0.55, 0.5, 0.37)
COLUMNS = ["variant", "budget", "seed", "test", "macs", "evaluations"]
SETTINGS = rankNAS.Settings(calibration=1024, validation=1024)
TRIALS = 16

# Name: strategy, trials a budget, plain batch-norm re-estimation, refitted answers.
VARIANTS: dict[str, tuple[Strategy, int, bool, bool]] = {
    "energy, batch norms measured anew": (Energy(), 1, True, False),
    "energy": (Energy(), 1, False, False),
    "sum of errors": (Solve(), 1, False, False),
    "sum of squared errors": (Solve(power=2), 1, False, False),
    "measured harm": (Auto(), 1, False, False),
    "measured harm, batch norms measured anew": (Auto(), 1, True, False),
    "measured harm, Thompson sampling": (Auto(), TRIALS, False, False),
    "the same, answer not shrunk": (Auto(shrinkage=0.0), TRIALS, False, False),
    "energy, refitted": (Energy(), 1, False, True),
    "measured harm, refitted": (Auto(), 1, False, True),
    "measured harm, Thompson sampling, refitted (`auto`)": (Auto(), TRIALS, False, True),
}
OPERATORS = {"group_svd": ("svd", "group_svd"), "svd": ("svd",)}


@contextmanager
def measured_anew(wanted: bool) -> Iterator[None]:
    """Within, batch norms get what the calibration data says, not the difference."""
    if not wanted:
        yield
        return
    with mock.patch("rankNAS.evaluation.BatchNormReference.correct", lambda *_: None):
        yield


def rows(
    model: nn.Module, data: Data, seed: int, done: set[tuple[str, int]]
) -> Iterator[dict[str, object]]:
    """The rows of one seed, on tables that are made once for each set of operators."""
    jobs = {name: (None, *variant) for name, variant in VARIANTS.items()}
    for name, operators in OPERATORS.items():
        jobs[f"`auto` with {name} alone"] = (operators, Auto(), TRIALS, False, True)
    prepared: dict[tuple[str, ...] | None, tuple[Workbench, tuple[Problem, ...]]] = {}
    for name, (operators, strategy, trials, anew, refit) in jobs.items():
        if (name, seed) in done:
            continue
        if operators not in prepared:
            policy = RankPolicy() if operators is None else RankPolicy(operators=operators)
            prepared[operators] = prepare(
                model,
                data,
                strategies=[Auto()],
                budgets=[{"macs": b} for b in BUDGETS],
                objectives=[make_objective("accuracy")],
                settings=replace(SETTINGS, policy=policy),
                seed=seed,
            )
        bench, problems = prepared[operators]
        bench = replace(bench, evaluator=refitting(bench.evaluator, refit))
        bench.evaluator.forget()
        record = Record.open(
            None,
            name,
            configuration={},
            choices=problems[0].labels(),
            directions=problems[0].directions,
            resume=False,
        )
        with measured_anew(anew):
            study = Study(name, record, problems, strategy, bench, data, bench.dense())
            run(study, trials)
            for problem in problems:
                answer = study.answer(problem)
                yield {
                    "variant": name,
                    "budget": problem.budget["macs"],
                    "seed": seed,
                    "test": study.test(study.materialise(answer.allocation))["accuracy"],
                    "macs": answer.metrics["macs"] / study.dense["macs"],
                    "evaluations": len(study.trials),
                }


def refitting(evaluator: Evaluator, wanted: bool) -> Evaluator:
    evaluator.sequential = wanted
    return evaluator


def main(data_source: str, weights: str, out: Path, seeds: int) -> None:
    texts = peek_metadata(weights).values()
    normalize = next(filter(None, map(normalization_from_metadata, texts)), None)
    data = rankNAS.load_data(data_source, normalize=normalize)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, weights)
    path = out / "ablation.csv"
    done: set[tuple[str, int]] = set()
    if path.exists():
        counts = pd.read_csv(path).groupby(["variant", "seed"]).size()
        done = {key for key, count in counts.items() if count == len(BUDGETS)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if path.stat().st_size == 0:
            writer.writeheader()
        for seed in range(seeds):
            for row in rows(model, data, seed, done):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)
    summarise(path)


def summarise(path: Path) -> None:
    table = pd.read_csv(path).drop_duplicates(["variant", "budget", "seed"], keep="last")
    grouped = table.groupby(["variant", "budget"], sort=False)["test"]
    means, spreads = grouped.mean().unstack() * 100, grouped.std().unstack() * 100
    lines = [
        "| test accuracy, % (standard deviation) | " + " | ".join(map(str, BUDGETS)) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for variant in table.variant.unique():
        cells = [
            f"{means.loc[variant, b]:.2f}"
            + (f" ({spreads.loc[variant, b]:.2f})" if spreads.notna().loc[variant, b] else "")
            for b in BUDGETS
        ]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    lines += ["", f"{table.seed.nunique()} seeds, `{TRIALS}` trials a budget where sampled."]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True, help="a ResNet-20 for this data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.data, arguments.weights, arguments.out, arguments.seeds)
