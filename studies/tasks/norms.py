"""The norms of the decomposition on ten generated regression problems.

    python studies/tasks/norms.py [--strategy solve] [--budget 0.25]

Prints 1 - R² on the test data for each norm, and how the default norm compares with the best.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from problems import friedman_terms
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.recovery import TrainingConfig, train

NORMS = ("fisher", "input", "pooled", "weight")
OUTPUTS = (1, 2, 2, 10, 4, 3, 2, 6, 1, 8)
CORRELATED, UNEQUAL, NORMALISED = (1, 6), (4, 7), (3, 7)


def problem(number: int) -> tuple[nn.Module, tuple[TensorDataset, TensorDataset]]:
    """A trained network and its data.

    Some problems have two correlated outputs, outputs of unequal scales, or batch norms.
    """
    rng, outputs = np.random.default_rng(number), OUTPUTS[number]
    inputs, terms = friedman_terms(3000, number)
    mixing = rng.normal(size=(4, outputs))
    if number in CORRELATED:
        mixing[:, 1] = mixing[:, 0] + 0.05 * rng.normal(size=4)
    targets = terms @ mixing + 0.5 * rng.normal(size=(3000, outputs))
    targets = (targets - targets.mean(0)) / targets.std(0)
    if number in UNEQUAL:
        targets = targets * 10.0 ** rng.uniform(-0.5, 0.5, outputs)
    x, y = torch.tensor(inputs).float(), torch.tensor(targets).float()
    data = TensorDataset(x[:2500], y[:2500]), TensorDataset(x[2500:], y[2500:])
    torch.manual_seed(number)
    network = _network(outputs, (64, 96, 128)[number % 3], number)
    config = TrainingConfig(
        40, batch_size=64, learning_rate=2e-3, optimizer="adamw", weight_decay=1e-4, seed=number
    )
    return train(network, data[0], config), data


def _network(outputs: int, width: int, number: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (10, *[width] * (2 + number % 2)):
        layers.append(nn.Linear(inputs, width))
        if number in NORMALISED:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def main() -> None:
    """Search with each norm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="solve")
    parser.add_argument("--budget", type=float, default=0.25)
    given = parser.parse_args()
    print("| problem | dense | " + " | ".join(NORMS) + " | default over best |")
    print("|---" * (len(NORMS) + 3) + "|")
    near, worst = 0, 0.0
    for number, outputs in enumerate(OUTPUTS):
        network, data = problem(number)
        errors = {}
        for norm in NORMS:
            settings = rankNAS.Settings(norm=norm, calibration=512, validation=256)  # type: ignore[arg-type]
            study = rankNAS.search(
                network,
                data,
                budget={"macs": given.budget},
                strategy=given.strategy,
                n_trials=4,
                settings=settings,
            )
            errors[norm] = 1 - study.test()["r2"]
        dense = 1 - study.measure(network, study.splits.test)["r2"]
        ratio = errors[rankNAS.Settings().norm or "fisher"] / min(errors.values())
        near, worst = near + (ratio <= 1.05), max(worst, ratio)
        cells = " | ".join(f"{errors[norm]:.4f}" for norm in NORMS)
        print(f"| {number}, {outputs} outputs | {dense:.4f} | {cells} | {ratio:.3f} |", flush=True)
    print(
        f"\nWithin 5 % of the best norm: {near} of {len(OUTPUTS)}; at most {worst:.3f} times it."
    )


if __name__ == "__main__":
    main()
