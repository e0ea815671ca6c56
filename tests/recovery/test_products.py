"""Decay of the product of factors: its gradients against autograd's, and its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rankNAS.decompositions import LayerShape
from rankNAS.decompositions.shapes import GroupedLinear
from rankNAS.recovery.products import ProductDecay, chains, is_product, product_gradients
from rankNAS.recovery.progressive import chain_ranks
from rankNAS.strategies.supernet.network import multiply

CHAINS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "linear": lambda: (nn.Linear(9, 4, bias=False), nn.Linear(4, 7)),
    "grouped linear": lambda: (GroupedLinear(12, 6, 3, bias=False), nn.Linear(6, 5)),
    "convolution": lambda: (nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(4, 5, 1)),
    "spatial": lambda: (nn.Conv2d(6, 4, (3, 1), bias=False), nn.Conv2d(4, 5, (1, 3))),
    "groups": lambda: (nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Conv2d(4, 5, 1)),
    "of a grouped layer": lambda: (
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.Conv2d(8, 6, 1, groups=2),
    ),
    "sequences": lambda: (nn.Conv1d(6, 4, 3, bias=False), nn.Conv1d(4, 5, 1)),
    "tucker": lambda: (
        nn.Conv2d(6, 3, 1, bias=False),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.Conv2d(4, 5, 1),
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_gradients_are_those_of_autograd(kind: str) -> None:
    torch.manual_seed(0)
    stages: list[Any] = [stage.double() for stage in CHAINS[kind]()]
    shapes = [
        LayerShape(12, 6, groups=3) if isinstance(s, GroupedLinear) else LayerShape.of(s)
        for s in stages
    ]
    groups = shapes[-1].groups
    product = multiply(shapes, [stage.weight for stage in stages], groups)
    loss = 0.5 * product.square().sum()
    expected = torch.autograd.grad(loss, [stage.weight for stage in stages])
    found = product_gradients(stages)
    assert is_product(stages)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_other_chains_are_left_to_the_optimiser() -> None:
    twice = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3)
    crossed = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2)
    assert not is_product(twice) and not is_product(crossed)
    network = nn.Sequential(
        nn.Sequential(*twice),
        nn.Sequential(nn.Conv2d(5, 2, 1, bias=False), nn.Conv2d(2, 5, 1)),
        nn.Sequential(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)),  # a bias in between
        nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU()),
    )
    assert [chain.path for chain in chains(network)] == ["0", "1"]
    assert chain_ranks(network) == {"1": 2}
    part = ProductDecay(network, 0.1, "sgd")
    assert [chain.path for chain in part.chains] == ["1"]
    exempt = {id(weight) for weight in part.exempt()}
    assert exempt == {id(stage.weight) for stage in network[1]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_product_shrinks_by_the_decay(optimizer: str) -> None:
    """Steps without a loss multiply U V by (1 - r d)² to first order in each factor's share."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 6)))
    first, second = network[0]
    nn.init.orthogonal_(first.weight)
    nn.init.orthogonal_(second.weight)
    before = second.weight @ first.weight
    part = ProductDecay(network, 0.1, optimizer)
    for weight in (first.weight, second.weight):
        weight.grad = torch.zeros_like(weight)
    part.before_step(0.5)
    if optimizer == "sgd":
        with torch.no_grad():
            for weight in (first.weight, second.weight):
                weight.sub_(0.5 * weight.grad)
    torch.testing.assert_close(second.weight @ first.weight, before * (1 - 0.5 * 0.1) ** 2)


def test_frozen_factors_do_not_decay() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 6)))
    first, second = network[0]
    part = ProductDecay(network, 0.1, "adamw")
    kept, moved = first.weight.clone(), second.weight.clone()
    second.weight.grad = torch.zeros_like(second.weight)
    part.before_step(0.5)
    assert torch.equal(first.weight, kept) and not torch.equal(second.weight, moved)
