"""SwiftLearn on a small text classifier: seconds and accuracy on a part of the samples.

    python studies/recovery/swiftlearn.py --text FOLDER [--seeds 2] [--out result.csv]

FOLDER holds .txt files. Together they are cut into equal pieces, and the pieces into windows of
words; the class of a window is its piece. A convolutional classifier is trained on all windows but
a fifth, compressed without training, and fine-tuned by each row. Seconds are CPU seconds of the
fine-tuning, scoring included; accuracies are those of the windows left out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.recipe import Recipe
from rankNAS.recovery.swiftlearn import SwiftLearn

WORDS = 8000  # of the vocabulary; all others are one
WINDOWS = 10_000  # at most
KEPT = (0.1, 0.3, 0.5)
OPTIONS: dict[str, Any] = {
    "distill": 0.0,
    "decay": 0.0,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "speed": "plain",
}
#: By name of a row: score and draw.
SCORES = {
    "random": ("random", "top"),
    "loss, top": ("loss", "top"),
    "loss, weighted": ("loss", "weighted"),
    "gradient, weighted": ("gradient", "weighted"),
}


class Classifier(nn.Module):
    """Logits (N, C) of windows of words (N, T)."""

    def __init__(self, words: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.convolution = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, words: Tensor) -> Tensor:
        x = self.convolution(self.embedding(words).transpose(1, 2)).relu().amax(2)
        return self.head(self.dropout(self.hidden(x).relu()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--window", type=int, default=24, help="words")
    parser.add_argument("--budget", type=float, default=0.3, help="of the MACs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kept", type=float, nargs="+", default=list(KEPT))
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    found = []
    for seed in range(args.seeds):
        train, test = windows(args.text, args.classes, args.window, seed)
        torch.manual_seed(seed)
        dense = Classifier(WORDS, args.classes)
        trained(dense, train, Distil(epochs=args.epochs, **OPTIONS), seed)
        small = compressed(dense, train, args.budget, seed)
        common = {"seed": seed, "dense": accuracy(dense, test), "before": accuracy(small, test)}
        for (kept, name), recipe in rows(args.epochs, args.kept).items():
            network = copy.deepcopy(small)
            seconds = trained(network, train, recipe, seed)
            row = {"row": name, "kept": kept, "seconds": seconds} | common
            found.append(row | {"accuracy": accuracy(network, test)})
            print(found[-1], flush=True)
    table = pd.DataFrame(found)
    if args.out is not None:
        table.to_csv(args.out, index=False)
    print(summary(table))


def rows(epochs: int, kept: list[float]) -> dict[tuple[float, str], Recipe]:
    """The recipes by share and name; a shorter training on all samples is the control."""
    found: dict[tuple[float, str], Recipe] = {}
    found[1.0, "all samples"] = Distil(epochs=epochs, **OPTIONS)
    for share in kept:
        # The warm-up, the epochs on a part, and about an epoch for all scoring.
        fewer = round(1 + share * (epochs - 1) + 1)
        found[share, "all samples, fewer epochs"] = Distil(epochs=fewer, **OPTIONS)
    for name, (score, draw) in SCORES.items():
        for share in kept:
            found[share, name] = SwiftLearn(
                epochs=epochs,
                keep=share,
                score=score,
                draw=draw,  # type: ignore[arg-type]
                warm_up=1,
                refresh=3,
                **OPTIONS,
            )
    return found


def windows(
    folder: Path, classes: int, length: int, seed: int
) -> tuple[TensorDataset, TensorDataset]:
    """Windows of words with their classes: four fifths, and the last fifth of an order."""
    files = sorted(folder.glob("*.txt"))
    words = [word for file in files for word in file.read_text("utf-8").lower().split()]
    known = {word: n for n, (word, _) in enumerate(Counter(words).most_common(WORDS - 1), 1)}
    count = min(len(words) // length, WINDOWS)
    words = words[: count * length]
    if count < 10 * classes:
        raise SystemExit(f"{folder} has too few words in .txt files; give a longer text.")
    ids = torch.tensor([known.get(word, 0) for word in words])
    x, y = ids.reshape(count, length), torch.arange(count) * classes // count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order[: count * 4 // 5], order[count * 4 // 5 :]
    train, test = (TensorDataset(x[part], y[part]) for part in parts)
    return train, test


def compressed(dense: nn.Module, train: TensorDataset, budget: float, seed: int) -> nn.Module:
    """The classifier with low-rank layers, without training."""
    study = rankNAS.search(
        dense,
        train,
        task="classification",
        strategy="solve",
        budget=[{"layer_macs": budget}],
        seed=seed,
        settings=rankNAS.Settings(calibration=512, validation=512),
    )
    (problem,) = study.problems
    return study.materialise(study.solution(problem).allocation)


def trained(network: nn.Module, data: TensorDataset, recipe: Recipe, seed: int) -> float:
    """Train a network by a recipe; CPU seconds."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        rankNAS.recover(
            network,
            data,
            recipe,
            task="classification",
            seed=seed,
            checkpoint=Path(folder) / "run.pt",
        )
    return time.process_time() - started


@torch.no_grad()
def accuracy(network: nn.Module, test: TensorDataset) -> float:
    """Per cent of the samples."""
    x, y = test.tensors
    return 100 * float((network.eval()(x).argmax(1) == y).float().mean())


def summary(table: pd.DataFrame) -> str:
    """By row and share, the mean accuracy and seconds, in Markdown."""
    means = table.groupby(["row", "kept"], sort=False)[["accuracy", "seconds"]].mean()
    shares = list(table.kept.unique())
    lines = [
        f"dense {table.dense.mean():.1f} %, compressed {table.before.mean():.1f} %, "
        f"{table.seed.nunique()} seeds; accuracy in per cent, CPU seconds",
        "| | " + " | ".join(f"{share:g}" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    for name in table.row.unique():
        cells = []
        for share in shares:
            known = (name, share) in means.index
            mean = means.loc[(name, share)] if known else None
            cells.append("" if mean is None else f"{mean.accuracy:.1f}, {mean.seconds:.1f} s")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
