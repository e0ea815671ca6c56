"""Processor seconds of `auto` on a synthetic network of 210 linear layers, by phase.

    python studies/benchmark/auto_scale.py [--blocks 30] [--width 64] [--strategy auto]

needs no data: blocks of seven linear layers as in a transformer (four of width x width, three of
width x 2 width) with random weights of decaying spectra, random inputs, on the CPU.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS

ITEMS, LENGTH, CLASSES = 512, 8, 10


class Block(nn.Module):
    """Attention and a gated network, both with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scores = self.q(y) @ self.k(y).mT / y.shape[-1] ** 0.5
        x = x + self.o(scores.softmax(-1) @ self.v(y))
        y = self.second(x)
        found: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return found


class Network(nn.Module):
    """Blocks, the mean over the positions, and a classifier."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(x).mean(1))
        return found


def network(blocks: int, width: int) -> Network:
    """A network whose weights have decaying spectra."""
    model = Network(blocks, width)
    with torch.no_grad():
        for block in model.blocks:
            for layer in block.children():
                if isinstance(layer, nn.Linear):
                    n = layer.in_features
                    decay = torch.arange(1, n + 1.0) ** -0.5
                    layer.weight.copy_(layer.weight @ (torch.randn(n, n) / n**0.5 * decay) * 3)
    return model.eval()


def main(blocks: int, width: int, strategy: str) -> None:
    """Search at half of the multiply-accumulates and print the phases."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = network(blocks, width)
    x = torch.randn(2 * ITEMS, LENGTH, width)
    with torch.no_grad():
        y = model(x).argmax(1)
    data = TensorDataset(x[:ITEMS], y[:ITEMS]), TensorDataset(x[ITEMS:], y[ITEMS:])
    started = time.process_time()
    study = rankNAS.search(model, data, budget={"macs": 0.5}, strategy=strategy)
    total = time.process_time() - started
    for phase, seconds in study.cpu_seconds.items():
        print(f"{phase}: {seconds:.1f} s")
    divergence = study.best.metrics[study.problem.divergence]
    print(
        f"{strategy}, {len(study.problem.errors)} layers: {total:.1f} s, "
        f"{len(study.trials)} trials, divergence {divergence:.4f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--strategy", default="auto")
    given = parser.parse_args()
    main(given.blocks, given.width, given.strategy)
