"""What each part of `auto` is worth on ResNet-20, without any training.

    python studies/resnet20_cifar10/ablation.py --data parquet:DIR --weights FILE --out FOLDER

Each group of variants is a comparison (`rankNAS.compare`). FOLDER/ablation.csv gets its rows as
soon as they are known, and those that are there are not searched again; FOLDER/ablation.md is made
from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pandas as pd

import rankNAS
from rankNAS.models.weights import load_weights, recorded_normalization
from rankNAS.reporting.rows import DENSE_MODEL, Row, summarise, with_current_columns
from rankNAS.search_spaces.zoo import build_model
from rankNAS.strategies import Auto, Energy, Solve, Strategy

BUDGETS = (0.7, 0.55, 0.5, 0.37)
TRIALS = 16
PLAIN = rankNAS.Settings(sequential=False)
REFITTED = rankNAS.Settings()

# Variants by name, trials a budget, settings, whether batch norms are measured anew.
GROUPS: list[tuple[dict[str, Strategy], int, rankNAS.Settings, bool]] = [
    (
        {
            "energy, batch norms measured anew": Energy(),
            "measured harm, batch norms measured anew": Auto(),
        },
        1,
        PLAIN,
        True,
    ),
    (
        {
            "energy": Energy(),
            "sum of errors": Solve(),
            "sum of squared errors": Solve(power=2),
            "measured harm": Auto(),
        },
        1,
        PLAIN,
        False,
    ),
    (
        {
            "measured harm, Thompson sampling": Auto(),
            "the same, answer not shrunk": Auto(shrinkage=0.0),
        },
        TRIALS,
        PLAIN,
        False,
    ),
    ({"energy, refitted": Energy(), "measured harm, refitted": Auto()}, 1, REFITTED, False),
    ({"measured harm, Thompson sampling, refitted (`auto`)": Auto()}, TRIALS, REFITTED, False),
]
for operators in (("svd", "group_svd"), ("svd",)):
    policy = rankNAS.RankPolicy(operators=operators)
    name = f"`auto` with {' and '.join(operators)} alone"
    GROUPS.append(({name: Auto()}, TRIALS, replace(REFITTED, policy=policy), False))


@contextmanager
def measured_anew(wanted: bool) -> Iterator[None]:
    """Within, batch norms get what the calibration data says, not the difference."""
    if not wanted:
        yield
        return
    with mock.patch("rankNAS.compression.batch_norm.BatchNormReference.correct", lambda *_: None):
        yield


def main(data_source: str, weights: str, out: Path, seeds: int) -> None:
    data = rankNAS.load_data(data_source, normalize=recorded_normalization(weights))
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, weights)
    path = out / "ablation.csv"
    rows = []
    if path.exists():
        rows = with_current_columns(pd.read_csv(path)).to_dict("records")

    def on_row(row: Row) -> None:
        rows.append(asdict(row))
        pd.DataFrame(rows).to_csv(path, index=False)
        print(row, flush=True)

    for strategies, trials, settings, anew in GROUPS:
        earlier = pd.DataFrame([r for r in rows if r["strategy"] in (DENSE_MODEL, *strategies)])
        with measured_anew(anew):
            rankNAS.compare(
                model,
                data,
                strategies,
                [{"macs": budget} for budget in BUDGETS],
                range(seeds),
                n_trials=trials,
                settings=settings,
                earlier=earlier if len(earlier) else None,
                on_row=on_row,
            )
    summarised(pd.DataFrame(rows), path.with_suffix(".md"))


def summarised(rows: pd.DataFrame, path: Path) -> None:
    """A table of variants and budgets."""
    table = summarise(rows[rows.strategy != DENSE_MODEL])
    budgets = list(table.budget.unique())
    lines = [
        f"| test accuracy, % (standard deviation) | {' | '.join(budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for variant in rows[rows.strategy != DENSE_MODEL].strategy.unique():
        found = table[table.strategy == variant].set_index("budget")
        cells = [f"{100 * found.test[b]:.2f} ({100 * found.test_std[b]:.2f})" for b in budgets]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", f"{rows.seed.nunique()} seeds; {TRIALS} trials a budget where sampled."]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True, help="a ResNet-20 for this data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.data, arguments.weights, arguments.out, arguments.seeds)
