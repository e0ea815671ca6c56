"""Samples a second of a recipe beside a plain training loop of the same network.

    python studies/recovery/rate.py --space resnet20 --recipe distil

The weights and the images are random: only seconds are measured. The plain loop has the same
batches, optimiser and memory format, the cross-entropy of labels, and no augmentation. The recipe
trains for so many epochs that the dense network's outputs are kept after the first ones, and then
for as many again; both kinds are shown. The two loops take turns. The seconds are those of the
process, as other work disturbs them less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from freezing import paired_ratio, thin
from torch import nn
from torch.nn import functional

from rankNAS.data.images.augment import Augmentation
from rankNAS.data.samples import Samples
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.recipe import Job, make_recipe
from rankNAS.recovery.recover import run_recipe
from rankNAS.search_spaces.zoo import build_model
from rankNAS.tasks.classification import Classification
from rankNAS.trees import channels_last

STEPS = 8  # of an epoch
ONCE = "recipe, the dense network runs"
KEPT = "recipe, its outputs are kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--space", default="resnet20")
    parser.add_argument("--operator", default="svd")
    parser.add_argument("--kept", type=float, default=0.5, help="of each layer's multiply-adds")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--recipe", default="distil")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = build_model(args.space, num_classes=10, input_shape=(3, args.size, args.size)).eval()
    network = thin(args.space, args.operator, args.kept, args.size)
    images = torch.randn(STEPS * args.batch, 3, args.size, args.size)
    labels = torch.randint(10, (len(images),))
    seconds: dict[str, list[float]] = {"plain loop": [], ONCE: [], KEPT: []}
    for _ in range(args.repeats):
        seconds["plain loop"].append(plain(network, images, labels, args.batch))
        for kind, value in recipe(network, dense, images, labels, args).items():
            seconds[kind].append(value)
    report(args, seconds)


def plain(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    """Seconds of a step of a loop as one writes it by hand."""
    network = copy.deepcopy(network).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    spent = []
    for _ in range(2):  # the first epoch warms up
        began = time.process_time()
        for chosen in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            found = network(channels_last(images[chosen]))
            functional.cross_entropy(found, labels[chosen]).backward()
            optimizer.step()
        spent.append(time.process_time() - began)
    return spent[-1] / STEPS


def recipe(
    network: nn.Module,
    dense: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Seconds of a step of the recipe, by whether the dense network runs."""
    given = make_recipe(args.recipe)
    if not isinstance(given, Distil) or given.augmentations < 2:
        raise SystemExit("--recipe must be distil, or one made from it, with two augmentations")
    variants = given.augmentations
    chosen = replace(given, speed="plain", batch_size=args.batch, epochs=2 * variants)
    ends = [time.process_time()]
    samples = Samples.of((images, labels))
    task = Classification().bound(samples.example(), dense)
    with tempfile.TemporaryDirectory() as folder:  # not the checkpoint of an earlier training
        job = Job(
            copy.deepcopy(network),
            samples,
            task,
            copy.deepcopy(dense),
            Augmentation(flip=True),
            checkpoint=Path(folder) / "training.pt",
        )
        run_recipe(chosen, job, on_epoch=lambda _: ends.append(time.process_time()))
    each = [(end - began) / STEPS for began, end in zip(ends, ends[1:], strict=False)]
    return {ONCE: statistics.median(each[1:variants]), KEPT: statistics.median(each[variants:])}


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """Print a table of medians and the ratios of paired measurements."""
    print(
        f"{args.space}, {args.operator}, {args.kept:g} of the multiply-adds of each layer, "
        f"{args.recipe}, batches of {args.batch}, {args.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    print("| loop | samples a second | seconds over those of the plain loop, least to largest |")
    print("|---|---|---|")
    whole = seconds["plain loop"]
    for kind, values in seconds.items():
        rate = args.batch / statistics.median(values)
        print(f"| {kind} | {rate:.0f} | {paired_ratio(values, whole)} |")


if __name__ == "__main__":
    main()
