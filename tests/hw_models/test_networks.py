"""Whole networks: drawn, built, run and watched."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE
from rankNAS.hw_models.networks import (
    OWN,
    Network,
    Watch,
    batched,
    built,
    in_network_factors,
    place,
    random_allocations,
)
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.trees import Inputs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * 36, 24),
        nn.Linear(24, 5),
    ).eval()


def space() -> SearchSpace:
    policy = RankPolicy(candidates=60)
    return compile_space(network(), torch.randn(1, 8, 6, 6), policy=policy, min_weights=1)


def test_built_networks_are_the_allocations() -> None:
    dense, x = network(), torch.randn(2, 8, 6, 6)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    found = space()
    for allocation in (found.dense, *random_allocations(found, 3, seed=1)):
        with torch.no_grad():
            y = built(dense, allocation, x)()
        assert isinstance(y, torch.Tensor) and y.shape == (2, 5)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_random_allocations_are_of_every_size_and_of_the_space() -> None:
    found = space()
    allocations = random_allocations(found, 30, seed=0)
    kept = []
    for allocation in allocations:
        found.check(allocation)
        kept.append(found.cost(allocation).macs / found.dense_cost.macs)
    assert min(kept) < 0.3 and max(kept) > 0.7
    assert random_allocations(found, 30, seed=0) == allocations
    assert random_allocations(found, 30, seed=1) != allocations


def test_batches() -> None:
    x = torch.arange(6).reshape(3, 2)
    assert torch.equal(batched(x, 2).first, x[:2])
    assert torch.equal(batched(x, 7).first, torch.cat([x, x, x[:1]]))
    several = batched(Inputs((x,), {"mask": x > 2, "scale": torch.tensor(2.0), "flag": True}), 7)
    assert len(several.args[0]) == len(several.kwargs["mask"]) == 7
    assert (several.kwargs["scale"], several.kwargs["flag"]) == (2.0, True)


class Sleeps(nn.Module):
    """Takes a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_layers_are_timed_where_they_are() -> None:
    long, short = Sleeps(0.02), Sleeps(0.005)
    model = nn.Sequential(long, short, nn.ReLU(), long)  # one module at two paths, called twice
    watch = Watch(Network(model, torch.zeros(1)), [["0", "3"], ["1"]])
    for _ in range(3):
        watch()
    both, one = watch.seconds()
    assert both >= 0.04 and 0.005 <= one < both
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_left_of_a_watch_that_failed() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("failed")

    model = nn.Sequential(nn.ReLU(), Fails())
    with pytest.raises(RuntimeError, match="failed"):
        Watch(Network(model, torch.zeros(1)), [["0"], ["1"]])()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_layer_of_a_built_network_is_watched() -> None:
    found, x = space(), torch.randn(2, 8, 6, 6)
    for allocation in (found.dense, *random_allocations(found, 3, seed=1)):
        watch = built(network(), allocation, x).watching(found.layers.values())
        with torch.no_grad():
            watch()
        assert (watch.seconds() > 0).all() and len(watch.seconds()) == len(found.layers)


def test_factors_of_places_by_hand() -> None:
    found = space()
    first, second, third = found.layers.values()
    svd = next(c for c in first.choices if c.operator == "svd")
    dense = found.dense
    changed = type(dense).of({**dense, first.name: svd})
    times = [np.array([2.0, 4.0, 0.0]), np.array([3.0, 1.0, 0.0])]
    factors = in_network_factors(found, [dense, changed], times, lambda layer, choice: 1.0)
    # Dense: twice in the first layer (once), 4 and 1 times in the second; the third was not seen.
    mean = math.log(2 * 4 * 1) / 3
    assert factors[place(first.name, DENSE)] == pytest.approx(
        math.exp(mean + (math.log(2) - mean) / (1 + OWN))
    )
    assert factors[place(second.name, DENSE)] == pytest.approx(
        math.exp(mean + (math.log(4) - 2 * mean) / (2 + OWN))
    )
    assert factors[place(third.name, DENSE)] == pytest.approx(math.exp(mean))
    # One layer as svd: it is the operator's mean, for the other layers too.
    assert factors[place(first.name, svd)] == pytest.approx(3.0)
    assert factors[place(second.name, svd)] == pytest.approx(3.0)
    # Operators that were never seen get the mean of all.
    other = next(c for c in first.choices if c.operator not in ("svd", "dense"))
    assert factors[place(first.name, other)] == pytest.approx((2 * 4 * 1 * 3) ** 0.25)
    assert in_network_factors(found, [dense], [np.zeros(3)], lambda layer, choice: 1.0) == {}
