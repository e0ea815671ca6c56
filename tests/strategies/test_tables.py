"""Tables of a space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import BudgetError
from rankNAS.hw_models import LatencyTables
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.strategies.tables import build_problem, check_reachable


@pytest.fixture
def space(small_net: nn.Module) -> SearchSpace:
    return compile_space(small_net, torch.zeros(1, 3, 8, 8))


def test_costs_of_the_tables_are_those_of_the_space(
    small_net: nn.Module, space: SearchSpace
) -> None:
    problem = build_problem(space, factorise(small_net, space).errors(), {"params": 0.5})
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = [int(rng.integers(len(c))) for c in problem.choices.values()]
        allocation = problem.allocation(indices)
        assert problem.indices(allocation) == indices
        cost, dense = space.costs(allocation), space.costs(space.dense)
        for name, fraction in problem.fractions(indices).items():
            assert fraction == pytest.approx(cost[name] / dense[name], rel=1e-12)
        assert problem.meets(indices) == (cost["params"] <= 0.5 * dense["params"])


def tables(
    space: SearchSpace, seconds: dict[str, list[float]], remainder_cost: float
) -> LatencyTables:
    choices = {name: layer.choices for name, layer in space.layers.items()}
    arrays = {name: np.array(s) for name, s in seconds.items()}
    return LatencyTables(
        choices, arrays, {n: 0 * a for n, a in arrays.items()}, (remainder_cost, 0.0)
    )


def test_latency_counts_what_is_outside_the_layers(space: SearchSpace) -> None:
    seconds = {name: [1.0 + i for i in range(len(x))] for name, x in space.layers.items()}
    problem = build_problem(space, None, {"latency": 0.5}, latency=tables(space, seconds, 3.0))
    assert problem.dense["latency"] == len(space.layers) + 3
    assert problem.remainder_cost["latency"] == 3
    assert problem.limits["latency"] == 0.5 * (len(space.layers) + 3) - 3


def test_budgets_that_exclude_each_other() -> None:
    """Each budget can be met, but by different choices of the only layer."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False))
    space = compile_space(model, torch.zeros(1, 64))
    seconds = [1.0 if c.rank == (31,) else 10.0 for c in space.layers["0"].choices]
    latency = tables(space, {"0": [10.0, *seconds[1:]]}, 0.0)
    problem = build_problem(space, None, {"latency": 0.1, "macs": 0.5}, latency=latency)
    with pytest.raises(BudgetError, match="together, although each can be met alone"):
        problem.check()


class Recurrent(nn.Module):
    """A network of which almost all multiply-adds are in a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.first, self.head = nn.Linear(128, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(self.lstm(x)[0].mean(1)))


def test_a_budget_out_of_reach_names_what_stays_dense(space: SearchSpace) -> None:
    recurrent = compile_space(Recurrent(), torch.zeros(1, 6, 64))
    check_reachable(recurrent, [{"macs": 0.99, "latency": 0.01}])
    with pytest.raises(BudgetError, match=r"possible is 0.9\d+\. 99 % lie in 'lstm', .*recurrent"):
        check_reachable(recurrent, [{"macs": 0.99}, {"macs": 0.5}])
    with pytest.raises(BudgetError, match=r"smallest possible is [\d.]+\.$"):
        check_reachable(recurrent, [{"layer_macs": 1e-3}])
    with pytest.raises(BudgetError, match="smallest possible is"):
        check_reachable(space, [{"params": 1e-3}])


def test_allocations_of_the_problem_are_allocations_of_the_space(space: SearchSpace) -> None:
    problem = build_problem(space, None, {})
    assert problem.allocation([0] * len(space.layers)) == space.dense
    assert isinstance(problem.allocation([1] * len(space.layers)), Allocation)
