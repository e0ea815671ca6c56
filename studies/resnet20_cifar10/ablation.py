"""What each part of `solve` and `auto` is worth on ResNet-20, in divergence and in CPU seconds.

    python studies/resnet20_cifar10/ablation.py --data parquet:DIR --weights FILE --out FOLDER

Nothing is trained on labels. FOLDER/ablation.csv gets the rows of a variant and a seed as soon as
they are known, and those that are there are not searched again; FOLDER/ablation.md is made from
them. One thread. Nothing of earlier searches is reused.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import rankNAS
from rankNAS.data.base import Data
from rankNAS.models.weights import load_weights, recorded_normalization
from rankNAS.recovery import Refinement
from rankNAS.search_spaces.zoo import build_model
from rankNAS.strategies import Auto, Solve, Strategy

BUDGETS = (0.7, 0.55, 0.5, 0.37, 0.278)
STATED = rankNAS.Settings(sequential=False)
REFITTED = rankNAS.Settings()
REFINED = rankNAS.Settings(refine=Refinement())
TRIALS = 40

VARIANTS: dict[str, tuple[Strategy, rankNAS.Settings]] = {
    "sum of relative errors": (Solve(form="relative"), STATED),
    "sum of losses": (Solve(form="absolute"), STATED),
    "best of three forms": (Solve(), STATED),
    "best of three forms, refitted (`solve`)": (Solve(), REFITTED),
    "corrected losses, not refitted": (Auto(), STATED),
    "corrected losses, one refit": (Auto(refitted=1), REFITTED),
    "corrected losses (`auto`)": (Auto(), REFITTED),
    "each layer measured alone, corrected": (Auto(measured=True), REFITTED),
    "best of three forms, refined (`solve --refine`)": (Solve(), REFINED),
    "corrected losses, refined (`auto --refine`)": (Auto(), REFINED),
}


def main(source: str, weights: str, out: Path, seeds: list[int], only: str) -> None:
    torch.set_num_threads(1)
    data = rankNAS.load_data(source, normalize=recorded_normalization(weights))
    path = out / "ablation.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    known = {(row["variant"], row["seed"]) for row in rows}
    for seed in seeds:
        for variant in (name for name in VARIANTS if only in name):
            if (variant, seed) in known:
                continue
            rows += searched(variant, seed, data, weights)
            out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(path, index=False)
    path.with_suffix(".md").write_text(summarised(pd.DataFrame(rows)))


def searched(variant: str, seed: int, data: Data, weights: str) -> Iterator[dict[str, Any]]:
    """A row for each budget: metrics on the test images, and CPU seconds up to the network."""
    strategy, settings = VARIANTS[variant]
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, weights)
    seconds = dict.fromkeys((f"macs<={budget:g}" for budget in BUDGETS), 0.0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["RANKNAS_CACHE"] = cache
        last = time.process_time()

        def on_trial(trial: Any, _: Any) -> None:
            nonlocal last
            now = time.process_time()
            seconds[trial.budget_key] += now - last
            last = now

        study = rankNAS.search(
            model,
            data,
            budget=[{"macs": budget} for budget in BUDGETS],
            strategy=strategy,
            n_trials=TRIALS,
            seed=seed,
            settings=settings,
            on_trial=on_trial,
        )
        for problem in study.problems:
            started = time.process_time()
            best = study.solution(problem)
            network = study.materialise(best.allocation)
            seconds[problem.budget_key] += time.process_time() - started
            found = study.test(network)
            row = {
                "variant": variant,
                "seed": seed,
                "budget": float(problem.budget_key.removeprefix("macs<=")),
                "divergence": found["kl_divergence"],
                "accuracy": found["accuracy"],
                "cpu_seconds": seconds[problem.budget_key],
            }
            print(row, flush=True)
            yield row


def summarised(rows: pd.DataFrame) -> str:
    """A table of variants and budgets: means over the seeds."""
    budgets = sorted(rows.budget.unique(), reverse=True)
    lines = [
        "| divergence, accuracy in %, CPU seconds | "
        + " | ".join(f"{budget:g}" for budget in budgets)
        + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for variant in (name for name in VARIANTS if name in set(rows.variant)):
        means = (
            rows[rows.variant == variant]
            .groupby("budget")[["divergence", "accuracy", "cpu_seconds"]]
            .mean()
        )
        cells = [
            f"{m.divergence:.4f}, {100 * m.accuracy:.2f}, {m.cpu_seconds:.0f}"
            for m in (means.loc[budget] for budget in budgets)
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Means of {rows.seed.nunique()} seeds.", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True, help="a ResNet-20 for this data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="part of the names of the variants to search")
    arguments = parser.parse_args()
    main(arguments.data, arguments.weights, arguments.out, arguments.seeds, arguments.only)
