"""Seconds of `auto` for each of five budgets on ResNet-20, on the clock and of the process.

    python studies/resnet20_cifar10/seconds.py --data parquet:DIR --weights FILE [--refine]

They count from after the data and the weights are loaded to the network, with nothing cached. The
first budget includes calibration, factors and losses.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import torch

import rankNAS
from rankNAS.models.weights import load_weights, recorded_normalization
from rankNAS.recovery import Refinement
from rankNAS.search_spaces.zoo import build_model

BUDGETS = (0.7, 0.55, 0.5, 0.37, 0.278)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.data, normalize=recorded_normalization(args.weights))
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_weights(model, args.weights)
    spent = {f"macs<={budget:g}": [0.0, 0.0] for budget in BUDGETS}
    last = now()

    def count(key: str) -> None:
        nonlocal last
        passed = [after - before for after, before in zip(now(), last, strict=True)]
        spent[key] = [a + b for a, b in zip(spent[key], passed, strict=True)]
        last = now()

    def on_trial(trial: Any, _: Any) -> None:
        count(trial.budget_key)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["RANKNAS_CACHE"] = cache
        study = rankNAS.search(
            model,
            data,
            budget=[{"macs": budget} for budget in BUDGETS],
            strategy="auto",
            settings=rankNAS.Settings(refine=Refinement() if args.refine else None),
            on_trial=on_trial,
        )
        last = now()
        for problem in study.problems:
            study.materialise(study.solution(problem).allocation)
            count(problem.budget_key)
            wall, process = spent[problem.budget_key]
            print(f"{problem.budget_key}: {wall:.0f} s, process {process:.0f} s", flush=True)


def now() -> tuple[float, float]:
    """Seconds of the clock and of the process."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
