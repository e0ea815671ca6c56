"""Recipes at equal seconds on a compressed image network, beside the dense network as control.

    python studies/recovery/recipes.py --space resnet20 --data parquet:DIR --weights FILE --out DIR

Each budget is searched once by `solve`. Then the network is trained by each recipe for each number
of seconds, and the dense network is, too. DIR/results.csv gets a row as soon as it is known,
and rows that are there are not computed again; DIR/curves.csv has the accuracy on a part of the
test images after each epoch. DIR/curves.png is drawn from it. A training that was broken off goes
on from its checkpoint in the cache folder.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from csv_rows import append, rows_of
from matplotlib.figure import Figure
from scipy.optimize import curve_fit
from torch import nn

import rankNAS
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.models.weights import load_weights, recorded_normalization
from rankNAS.recovery.recipe import Job, make_recipe
from rankNAS.recovery.recover import run_recipe
from rankNAS.search_spaces.zoo import build_model
from rankNAS.study import Study
from rankNAS.tasks.base import Task

RECIPES = ("plain", "distil", "distil:refine=true", "msr")
RESULTS = ("network", "kept", "recipe", "seconds", "seed", "before", "after", "epochs", "used")
CURVES = ("network", "kept", "recipe", "seconds", "seed", "epoch", "accuracy")
CURVE_IMAGES = 2000
DENSE = 1.0  # kept of the control


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--space", default="resnet20")
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seconds", nargs="+", type=float, default=[300, 1200])
    parser.add_argument(
        "--kept", nargs="+", type=float, default=[0.278, 0.5, DENSE], help="of the MACs; 1: dense"
    )
    parser.add_argument("--epochs", type=int, help="instead of seconds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.data, normalize=recorded_normalization(args.weights))
    model = build_model(args.space, num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, args.weights)
    for seed in args.seeds:
        budgets = [kept for kept in args.kept if kept != DENSE] or [0.5]  # a study has a budget
        study = searched(model, data, budgets, seed)
        for row in wanted(args, seed):
            if row not in known(args.out / "results.csv"):
                record(args, study, budgets, row)
    draw(args.out)


def searched(model: nn.Module, data: Any, kept: Sequence[float], seed: int) -> Study:
    """The search of all budgets."""
    budgets = [{"macs": share} for share in kept]
    return rankNAS.search(model, data, budget=budgets, strategy="solve", n_trials=1, seed=seed)


def wanted(args: argparse.Namespace, seed: int) -> list[dict[str, str]]:
    """What identifies each row."""
    limits = [0.0] if args.epochs else args.seconds
    return [
        {
            "network": args.space,
            "kept": str(kept),
            "recipe": recipe,
            "seconds": f"{seconds:g}",
            "seed": str(seed),
        }
        for seconds in limits
        for recipe in args.recipes
        for kept in args.kept
        if kept != DENSE or not recipe.startswith(("msr", "prehab"))  # these need ranks
    ]


def record(
    args: argparse.Namespace, study: Study, budgets: Sequence[float], row: Mapping[str, str]
) -> None:
    """Train one network by one recipe, and write its row and its curve."""
    kept, dense = float(row["kept"]), study.context.factorisation.model
    network = copy.deepcopy(dense)
    if kept != DENSE:
        problem = study.problems[budgets.index(kept)]
        network = study.materialise(study.solution(problem).allocation)
    splits, task = study.splits, study.task
    assert splits.test is not None
    before = accuracy(network, splits.test, task)
    few = splits.test.subsample(CURVE_IMAGES, 0)
    teacher, seed = copy.deepcopy(dense), int(row["seed"])
    job = Job(network, splits.training, task, teacher, splits.augmentation, seed=seed)
    text = row["recipe"] + (":" if ":" not in row["recipe"] else ",")
    if args.epochs:
        text += f"epochs={args.epochs}"
    else:
        text += f"epochs=1000,seconds={row['seconds']}"
    recipe = make_recipe(text)

    def on_epoch(epoch: int) -> None:
        value = accuracy(network, few, task)
        append(args.out / "curves.csv", CURVES, {**row, "epoch": epoch, "accuracy": value})

    report = run_recipe(recipe, job, on_epoch=on_epoch)
    after = accuracy(network, splits.test, task)
    per_epoch = math.ceil(len(splits.training) / recipe.batch_size)
    found = {"before": before, "after": after, "used": round(report.seconds)}
    found["epochs"] = round(report.steps / per_epoch, 2)
    append(args.out / "results.csv", RESULTS, {**row, **found})
    print({**row, **found}, flush=True)


def accuracy(network: nn.Module, samples: Samples, task: Task) -> float:
    """The accuracy in evaluation mode; the mode of the network stays."""
    mode = network.training
    found = network_metrics(network.eval(), samples, task)["accuracy"]
    network.train(mode)
    return round(found, 4)


def known(path: Path) -> list[dict[str, str]]:
    """What identifies the rows of a file."""
    return [{name: row[name] for name in RESULTS[:5]} for row in rows_of(path)]


def reached(accuracies: Sequence[float], target: float) -> float:
    """The epoch at which a - b e^-c, fitted to the accuracy after epoch e, reaches a target.

    Infinite if it never does.
    """
    epochs = np.arange(1, len(accuracies) + 1, dtype=float)

    def law(e: Any, a: float, b: float, c: float) -> Any:
        return a - b * e**-c

    start = [max(accuracies), max(accuracies) - min(accuracies) + 1e-3, 0.5]
    bounds = ([0, 0, 0.05], [1.0, 1.0, 5.0])
    (a, b, c), _ = curve_fit(law, epochs, accuracies, p0=np.clip(start, *bounds), bounds=bounds)
    return float((b / (a - target)) ** (1 / c)) if a > target else math.inf


def draw(out: Path) -> None:
    """Draw the curves of all rows."""
    rows = rows_of(out / "curves.csv")
    if not rows:
        return
    matplotlib.use("Agg")
    lines: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in CURVES[:5])
        lines.setdefault(key, []).append(100 * float(row["accuracy"]))
    budgets = sorted({key[1] for key in lines}, key=float)
    figure = Figure((4.2 * len(budgets), 3.4), dpi=150, layout="constrained")
    for axes, kept in zip(
        figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True
    ):
        for (_, share, recipe, seconds, seed), values in lines.items():
            if share == kept:
                label = f"{recipe}, {seconds} s" + (f", seed {seed}" if seed != "0" else "")
                axes.plot(range(1, len(values) + 1), values, label=label)
        axes.set_title("dense" if float(kept) == DENSE else f"{kept} of the MACs", fontsize=10)
        axes.set_xlabel("epochs")
        axes.legend(fontsize=6)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.savefig(out / "curves.png")


if __name__ == "__main__":
    main()
