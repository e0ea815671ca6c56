"""ResNet-20 on CIFAR-10 without any training: uniform, energy, random and bo at equal budgets.

    python studies/resnet20_cifar10/run.py --data parquet:DIR --weights FILE

takes about 45 minutes on two CPU cores. Each line of results.csv is one search, written when it
ends; lines that are there already are not searched again. summary.md and accuracy.png are made
from results.csv. Expected: `bo` above `random` and `uniform` at both of its budgets.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import rankNAS
from rankNAS.data import Data, normalization_from_metadata
from rankNAS.evaluation import test_metrics
from rankNAS.search_spaces.zoo import build_model
from rankNAS.weights import load_weights, peek_metadata

HERE = Path(__file__).parent
COLUMNS = ["strategy", "budget", "seed", "trials", "validation", "test", "macs", "params", "dense"]
# The whole-model fractions at which the decomposed layers keep 0.698, 0.549, 0.491 and 0.372.
BUDGETS = (0.7013, 0.5539, 0.4966, 0.3789, 0.25)
SEARCHED = (0.4966, 0.3789)
TRIALS, SEEDS = 25, 5
SETTINGS = rankNAS.Settings(calibration=1024, validation=1024)


def jobs() -> list[tuple[str, float, int]]:
    """Strategy, budget and seed; all seeds where all strategies are compared, else two."""
    compared = [
        (strategy, budget, seed)
        for seed in range(SEEDS)
        for budget in SEARCHED
        for strategy in ("uniform", "energy", "random", "bo")
    ]
    others = [
        (strategy, budget, seed)
        for seed in range(2)
        for budget in BUDGETS
        if budget not in SEARCHED
        for strategy in ("uniform", "energy")
    ]
    return compared + others


def search(
    model: torch.nn.Module, data: Data, strategy: str, budget: float, seed: int
) -> dict[str, object]:
    """One search, and the test accuracy of its best trial."""
    study = rankNAS.search(
        model,
        data,
        budget={"macs": budget},
        strategy=strategy,
        n_trials=TRIALS,
        seed=seed,
        settings=SETTINGS,
    )
    best = study.best.metrics
    return {
        "strategy": strategy,
        "budget": budget,
        "seed": seed,
        "trials": len(study.trials),
        "validation": round(best["accuracy"], 5),
        "test": round(study.test()["accuracy"], 5),
        "macs": best["macs"] / study.dense["macs"],
        "params": best["params"] / study.dense["params"],
    }


def run(data_source: str, weights: str, results: Path) -> None:
    texts = peek_metadata(weights).values()
    normalize = next(filter(None, map(normalization_from_metadata, texts)), None)
    data = rankNAS.load_data(data_source, normalize=normalize)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, weights)
    dense = round(test_metrics(copy.deepcopy(model), data.test)["accuracy"], 5)
    done = set()
    if results.exists():
        table = pd.read_csv(results)
        done = set(zip(table.strategy, table.budget, table.seed, strict=True))
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for job in jobs():
            if job in done:
                continue
            started = time.time()
            row = search(model, data, *job) | {"dense": dense}
            writer.writerow(row)
            file.flush()
            print(row, f"{time.time() - started:.0f} s", flush=True)


def summarise(results: Path) -> None:
    table = pd.read_csv(results)
    grouped = table.groupby(["budget", "strategy"])
    mean, spread = grouped["test"].mean() * 100, grouped["test"].std() * 100
    count, trials = grouped["test"].count(), grouped["trials"].max()
    lines = [
        "| MACs kept | strategy | trials | seeds | test accuracy, % | standard deviation |",
        "|---|---|---|---|---|---|",
    ]
    for key in sorted(mean.index, key=lambda k: (-k[0], mean[k])):
        lines.append(
            f"| {key[0]} | {key[1]} | {trials[key]} | {count[key]} | {mean[key]:.2f} | "
            f"{spread[key]:.2f} |"
        )
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "botorch", "optuna", "numpy"))
    lines.append("")
    lines.append(
        f"Dense: {table.dense.iloc[0] * 100:.2f} %. {len(table)} searches; Python "
        f"{platform.python_version()}, {packages}."
    )
    (HERE / "summary.md").write_text("\n".join(lines) + "\n")
    draw(table)


def draw(table: pd.DataFrame) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=150)
    axes.axhline(table.dense.iloc[0] * 100, color="0.5", linewidth=1, linestyle="--")
    axes.annotate("dense", (0.255, table.dense.iloc[0] * 100 + 0.5), color="0.4")
    styles = {"uniform": "s-", "random": "v", "energy": "o-", "bo": "D"}
    for name, style in styles.items():
        rows = table[table.strategy == name].groupby("budget")["test"]
        axes.errorbar(
            rows.mean().index,
            rows.mean() * 100,
            rows.std() * 100,
            fmt=style,
            ms=5,
            capsize=3,
            label=name,
        )
    axes.set_xlabel("multiply-accumulates kept, fraction of the dense model's")
    axes.set_ylabel("CIFAR-10 test accuracy, %")
    axes.set_title("ResNet-20 compressed without training", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "accuracy.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True, help="a ResNet-20 for this data")
    arguments = parser.parse_args()
    results_file = HERE / "results.csv"
    run(arguments.data, arguments.weights, results_file)
    summarise(results_file)
