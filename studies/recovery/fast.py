"""ResNet-9 trained within seconds by the recipe ``fast``, with each of its parts taken away once.

    python studies/recovery/fast.py --data parquet:DIR --seconds 600 --seeds 0 1 2 --out fast.csv

A run trains on 5,000 images drawn by its seed and gives a row of the CSV file; rows that exist are
kept, and a run that was broken off goes on. ``accuracy`` is that of the mean of the logits for an
image and its mirror image, ``accuracy_plain`` that of the network alone: their difference is what
the mirror image brings. The table of a finished file is printed at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from csv_rows import append, rows_of
from torch import Tensor, nn

import rankNAS
from rankNAS.data.base import Data
from rankNAS.deadline import Deadline, limited_by
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.recovery.fast import Fast
from rankNAS.recovery.recipe import Job
from rankNAS.recovery.recover import run_recipe
from rankNAS.search_spaces.zoo.resnet9 import ResNet9, whiten
from rankNAS.tasks import Classification, Layout

LABELLED = Layout(inputs=(0,), target=1)
#: By part, the options of the network and of the recipe that take it away.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "whitening": ({"whitening": False}, {}),
    "ghosts": ({"ghosts": 1}, {}),
    "celu": ({"alpha": None}, {}),
    "smoothing": ({}, {"label_smoothing": 0.0}),
    "centralisation": ({}, {"centralise": False}),
    "sam": ({}, {"sam": 0.0}),
    "average": ({}, {"ema": 0.0}),
    "virtual": ({}, {"virtual": False}),
}
FIELDS = ("without", "seed", "accuracy", "accuracy_plain", "seconds", "steps", "planned", "epochs")
FIELDS += ("limit", "width", "images", "threads", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each training")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=16, help="of the first stage")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.2, help="peak of the learning rate")
    parser.add_argument("--speed", default="auto", help="as the recipe's option of this name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fast.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.data)
    known = {(row["without"], int(row["seed"])) for row in rows_of(args.out)}
    for seed in args.seeds:
        for part in args.without:
            if (part, seed) not in known:
                row = run(args, data, part, seed)
                append(args.out, FIELDS, row)
                print(row, flush=True)
    print(table(rows_of(args.out)))


def run(args: argparse.Namespace, data: Data, part: str, seed: int) -> dict[str, Any]:
    """Train without a part; the row."""
    started = time.perf_counter()
    assert data.test is not None and data.num_classes is not None and data.input_shape is not None
    of_network, of_recipe = PARTS[part]
    samples, task = data.train.subsample(args.images, seed), Classification(layout=LABELLED)
    torch.manual_seed(seed)
    network = ResNet9(data.num_classes, data.input_shape[0], args.width, **of_network)
    recipe = Fast(
        seconds=args.seconds,
        batch_size=args.batch,
        learning_rate=args.rate,
        clip=None,
        speed=args.speed,
    )
    recipe = replace(recipe, **of_recipe)
    job = Job(network, samples, task, augmentation=data.augmentation, seed=seed)
    with limited_by(Deadline(args.seconds)):
        whiten(network, samples)
        report = run_recipe(recipe, job)
    seconds = time.perf_counter() - started
    averaged, plain = (
        network_metrics(found, data.test, task)["accuracy"]
        for found in (Mirrored(network), network)
    )
    return {
        "without": part,
        "seed": seed,
        "accuracy": round(averaged, 4),
        "accuracy_plain": round(plain, 4),
        "seconds": round(seconds, 1),
        "steps": report.steps,
        "planned": report.planned,
        "epochs": round(report.steps * args.batch / len(samples), 1),
        "limit": args.seconds,
        "width": args.width,
        "images": len(samples),
        "threads": args.threads,
        "torch": torch.__version__,
    }


class Mirrored(nn.Module):
    """The mean of a network's logits for images (N, C, H, W) and their mirror images.

    It takes twice the multiply-adds of the network. A budget counts those, so the average belongs
    to the measurement of this study and is not an option of the recipe.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        mean: Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return mean


def table(rows: Sequence[dict[str, str]]) -> str:
    """Accuracies in percent, means and sample deviations over seeds, as a Markdown table."""
    lines = [
        "| without | accuracy | without the mirror image | epochs | seconds |",
        "|" + 5 * "---|",
    ]
    for part in PARTS:
        found = [row for row in rows if row["without"] == part]
        if found:
            cells = [spread([100 * float(row[name]) for row in found]) for name in FIELDS[2:4]]
            epochs, seconds = (
                statistics.mean(float(row[name]) for row in found)
                for name in ("epochs", "seconds")
            )
            lines.append(f"| {part} | {cells[0]} | {cells[1]} | {epochs:.1f} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The mean and the sample deviation, if there are several."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
