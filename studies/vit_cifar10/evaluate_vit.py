"""Accuracy of the small ViT with projections factored at a third of the width, and by the search.

    python studies/vit_cifar10/evaluate_vit.py --data parquet:DIR --weights vit.safetensors

For each group of projections (q, k, v, qk, kv, qkv of all blocks), all of them get rank 64: by
truncated SVD of the weights, and in the norm of inputs and output gradients with layers refitted.
The search may give any layer any rank within the same parameters. Nothing is trained on labels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import rankNAS
from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.data.base import Data
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.models.weights import load_weights, recorded_normalization
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo import build_model
from rankNAS.tasks import Classification, Layout

SHAPE = (3, 32, 32)
LABELLED = Layout(inputs=(0,), target=1)
GROUPS = ("q", "k", "v", "qk", "kv", "qkv")
THIRD = Choice("svd", (64,))
POLICY = RankPolicy(operators=("svd",))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--strategies", nargs="*", default=["solve", "auto"])
    parser.add_argument("--calibration", type=int, default=1024, help="images")
    parser.add_argument("--validation", type=int, default=2048, help="images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.data, normalize=recorded_normalization(args.weights))
    model = build_model("vit_cifar", num_classes=10, input_shape=SHAPE).eval()
    load_weights(model, args.weights)
    rows = pd.DataFrame(found(model, data, args))
    if args.out is not None:
        rows.to_csv(args.out, index=False)
    print(f"dense: {accuracy(model, data):.4f}\n\n{table(rows)}")


def found(model: nn.Module, data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and group, in the order of the ways."""
    space = compile_space(model, torch.zeros(1, *SHAPE), policy=POLICY)
    thirds = {group: factored(space, group) for group in GROUPS}
    kept = {g: space.cost(thirds[g]).params / space.dense_cost.params for g in GROUPS}
    plain = factorise(model, space)
    settings = rankNAS.Settings(
        calibration=args.calibration, validation=args.validation, policy=POLICY
    )
    common: dict[str, Any] = {"settings": settings, "seed": args.seed, "task": "classification"}
    networks = {("d/3, SVD", g): plain.materialise(thirds[g]) for g in GROUPS}
    study = rankNAS.search(
        model,
        data,
        budget={"params": 1.0},
        strategy="uniform",
        start=list(thirds.values()),
        n_trials=len(GROUPS),
        **common,
    )
    networks |= {("d/3, refitted", g): study.materialise(thirds[g]) for g in GROUPS}
    budgets = sorted(set(kept.values()), reverse=True)
    for strategy in args.strategies:
        study = rankNAS.search(
            model, data, budget=[{"params": b} for b in budgets], strategy=strategy, **common
        )
        solutions = dict(zip(budgets, map(study.solution, study.problems), strict=True))
        small = {b: study.materialise(s.allocation) for b, s in solutions.items()}
        networks |= {(strategy, g): small[kept[g]] for g in GROUPS}
    return [
        {"way": way, "group": g, "params": kept[g], "accuracy": accuracy(network, data)}
        for (way, g), network in networks.items()
    ]


def factored(space: SearchSpace, roles: str) -> Allocation:
    """The allocation with rank 64 for all layers of the roles, a letter each; others dense."""
    return Allocation.of(
        {
            name: THIRD if layer.roles and layer.roles[0] in [*roles] else DENSE
            for name, layer in space.layers.items()
        }
    )


def accuracy(network: nn.Module, data: Data) -> float:
    """The accuracy on the test images."""
    assert data.test is not None
    return network_metrics(network, data.test, Classification(layout=LABELLED))["accuracy"]


def table(rows: pd.DataFrame) -> str:
    """Test accuracy in per cent by way and group, in Markdown."""
    params = rows.drop_duplicates("group").set_index("group").params
    lines = ["| | " + " | ".join(f"{g} ({params[g]:.3f})" for g in GROUPS) + " |"]
    lines.append("|---|" + "---|" * len(GROUPS))
    for way, own in rows.groupby("way", sort=False):
        values = own.set_index("group").accuracy
        lines.append(f"| {way} | " + " | ".join(f"{100 * values[g]:.2f}" for g in GROUPS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
