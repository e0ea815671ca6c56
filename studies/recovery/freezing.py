"""Seconds of a training step with frozen groups of factors, on the shapes of ResNet-50.

    python studies/recovery/freezing.py --space resnet50 --kept 0.5

The weights are random: only seconds are measured. Each layer gets the choice of its operator with
the most multiply-adds within the budget. Steps with all factors trained, with the outer factors
frozen and with the others frozen take turns, in a new order each time. One thread by default; the
seconds are those of the process, as other work disturbs them less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.recovery.freeze import Freezing
from rankNAS.recovery.products import chains
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo import build_model
from rankNAS.trees import channels_last

#: What is trained, by the number of the epoch that `Freezing` takes; None trains all factors.
KINDS = {"all factors": None, "first factors frozen": 0, "second factors frozen": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--space", default="resnet50")
    parser.add_argument("--operator", default="svd")
    parser.add_argument("--kept", type=float, default=0.5, help="of each layer's multiply-adds")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network = thin(args.space, args.operator, args.kept, args.size)
    step = training_step(network, torch.randn(args.batch, 3, args.size, args.size))
    freezing, seconds = Freezing(network, 1), {kind: list[float]() for kind in KINDS}
    order = random.Random(0)
    for repeat in range(-1, args.repeats):
        for kind in order.sample(list(KINDS), len(KINDS)):
            freezing.thaw()
            if (epoch := KINDS[kind]) is not None:
                freezing.begin_epoch(epoch)
            began = time.process_time()
            step()
            if repeat >= 0:  # the first round warms up
                seconds[kind].append(time.process_time() - began)
    report(args, network, seconds)


def thin(space: str, operator: str, kept: float, size: int) -> nn.Module:
    """A network of random weights whose layers keep a share of their multiply-adds."""
    model = build_model(space, num_classes=10, input_shape=(3, size, size)).eval()
    policy = RankPolicy(operators=(operator,))
    compiled = compile_space(model, torch.zeros(1, 3, size, size), policy=policy)
    allocation = {name: within(layer, kept) for name, layer in compiled.layers.items()}
    chosen = compiled.restrict({name: [choice] for name, choice in allocation.items()})
    return factorise(model, chosen).materialise(allocation).train()


def within(layer: Layer, kept: float) -> Choice:
    """The choice with the most multiply-adds within a share of those of the dense layer."""
    limit = kept * layer[DENSE].macs
    fitting = [c for c in layer.choices if c != DENSE and layer[c].macs <= limit]
    return max(fitting, key=lambda c: layer[c].macs, default=layer.choices[-1])


def training_step(network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """A function that makes a forward and a backward pass."""
    network.to(memory_format=torch.channels_last)
    batch, labels = channels_last(images), torch.zeros(len(images), dtype=torch.long)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        functional.cross_entropy(network(batch), labels).backward()

    return step


def report(args: argparse.Namespace, network: nn.Module, seconds: dict[str, list[float]]) -> None:
    """Print a table of medians and the ratios of paired steps."""
    print(
        f"{args.space}, {args.operator}, {args.kept:g} of the multiply-adds of each layer, "
        f"{len(chains(network))} chains, {args.batch} images of {args.size} pixels, "
        f"{args.threads} threads, torch {torch.__version__}\n"
    )
    print("| trained | seconds a step | ratio, least to largest |\n|---|---|---|")
    whole = seconds["all factors"]
    for kind, values in seconds.items():
        print(f"| {kind} | {statistics.median(values):.3f} | {paired_ratio(values, whole)} |")


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """The median of the ratios of paired measurements, and the least and the largest."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
