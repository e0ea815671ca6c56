"""A network with every kind of layer, and helpers to compress it."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import Factorisation
from rankNAS.decompositions.shapes import is_hf_conv1d
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space


class Mixed(nn.Module):
    """Every kind of layer: grouped, strided, one- and two-dimensional, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(12, 12, 3, stride=2, groups=2, padding="valid", bias=False)
        self.conv3 = nn.Conv1d(12, 16, 3, padding="same", dilation=2)
        self.norm = nn.BatchNorm1d(16)
        self.shared = nn.Linear(9, 9)
        self.again = self.shared
        self.tied = nn.Linear(9, 9)
        self.tied.weight, self.tied.bias = self.shared.weight, self.shared.bias
        self.block = nn.Sequential(nn.Linear(9, 20), nn.ReLU(inplace=True))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu())
        x = self.norm(self.conv3(x.flatten(2)))
        x = self.tied(torch.tanh(self.again(torch.tanh(self.shared(x)))))
        return self.head(self.block(x).mean(1))


def mixed() -> tuple[nn.Module, SearchSpace, Tensor]:
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(12, 4, 8, 8)
    return model, compile_space(model, x[:1], min_weights=1, keep_output_dense=False), x


def drawn(space: SearchSpace, seed: int) -> Allocation:
    rng = random.Random(seed)
    return Allocation.of({n: rng.choice(layer.choices) for n, layer in space.layers.items()})


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


def fold_in(factorisation: Factorisation, allocation: Mapping[str, Choice]) -> nn.Module:
    """The dense architecture with the weights that each choice multiplies out to."""
    model = copy.deepcopy(factorisation.model)
    with torch.no_grad():
        for name, choice in allocation.items():
            weight, bias = factorisation.layers[name].folded(choice)
            module: Any = model.get_submodule(name)
            module.weight.copy_(weight.T if is_hf_conv1d(module) else weight)
            if bias is not None:
                module.bias.copy_(bias)
    return model
