"""Only what gets faster is decomposed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.strategies.history import History
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.hw_filter import HardwareFilter, faster_than_dense
from rankNAS.strategies.problem import Problem
from rankNAS.testing import StrategyContract, random_problem


def timed(seed: int, *, layers: int = 4, choices: int = 5, budget: float = 1.0) -> Problem:
    """Latencies that have nothing to do with MACs: about half of the choices are faster."""
    problem = random_problem(seed, layers=layers, choices=choices)
    rng = np.random.default_rng(seed)
    latency = tuple(np.array([1.0, *rng.uniform(0.2, 1.8, choices - 1)]) for _ in range(layers))
    return replace(
        problem,
        costs={**problem.costs, "latency": latency},
        remainder_cost={**problem.remainder_cost, "latency": 0.0},
        budget={"macs": budget},
    )


class TestHardwareFilter(StrategyContract):
    strategy = HardwareFilter()


class TestHardwareFilterWithLatencies(StrategyContract):
    strategy = HardwareFilter(margin=0.1)
    problems = {
        "one_budget": replace(timed(0), budget={"macs": 0.95}),
        "latency": replace(timed(1), budget={"latency": 0.9}),
        "two_objectives": replace(
            timed(2), objectives=("accuracy", "macs"), directions=("maximize", "minimize")
        ),
    }


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), margin=st.floats(0, 0.9))
def test_what_is_left_is_dense_or_faster(seed: int, margin: float) -> None:
    problem = timed(seed)
    filtered = faster_than_dense(problem, margin)
    for name, choices in problem.choices.items():
        i = list(problem.choices).index(name)
        latency = dict(zip(choices, problem.costs["latency"][i], strict=True))
        expected = [choices[0], *(c for c in choices if latency[c] < 1 - margin)]
        assert list(filtered.choices[name]) == expected
        for cost in problem.costs:
            kept = dict(zip(choices, problem.costs[cost][i], strict=True))
            assert filtered.costs[cost][i].tolist() == [kept[c] for c in expected]
    assert filtered.limits == problem.limits


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
def test_the_best_of_all_allocations_of_faster_choices(seed: int, share: float) -> None:
    problem = timed(seed, layers=3, choices=4, budget=share)
    allowed = [[i for i, t in enumerate(ts) if i == 0 or t < 1] for ts in problem.costs["latency"]]
    feasible = [i for i in itertools.product(*allowed) if problem.meets(i)]

    def worst(indices: tuple[int, ...]) -> float:
        return max(float(e[i]) for e, i in zip(problem.errors, indices, strict=True))

    if not feasible:
        with pytest.raises(BudgetError):
            HardwareFilter().solve(problem)
        return
    allocation = HardwareFilter().solve(problem)
    indices = tuple(problem.indices(allocation))
    assert indices in feasible
    assert worst(indices) == min(map(worst, feasible))


def test_layers_that_were_kept_out_are_named() -> None:
    problem = timed(0, layers=2, choices=3, budget=0.05)
    latency = (np.array([1.0, 1.2, 0.97]), np.array([1.0, 0.5, 0.4]))
    problem = replace(problem, costs={**problem.costs, "latency": latency})
    with pytest.raises(BudgetError) as caught:
        HardwareFilter(margin=0.05).propose(problem, History(), 1, np.random.default_rng(0))
    assert "no allocation keeps macs <= 0.05" in str(caught.value)
    assert "lowers their latency by more than 5 %: layer0. Raise the budget" in str(caught.value)


def test_nobody_is_blamed_where_no_layer_was_kept_out() -> None:
    problem = timed(0, layers=1, choices=3, budget=0.001)
    latency = (np.array([1.0, 0.5, 0.4]),)
    problem = replace(problem, costs={**problem.costs, "latency": latency})
    with pytest.raises(BudgetError, match=r"smallest possible is [\d.]+\.$"):
        HardwareFilter().solve(problem)


def test_without_latencies_it_is_the_min_max_allocation() -> None:
    problem = random_problem(4)
    assert faster_than_dense(problem) is problem
    assert HardwareFilter().solve(problem) == Energy().solve(problem)
    assert HardwareFilter().needs_latency


@pytest.mark.parametrize("margin", [-0.1, 1.0, float("nan")])
def test_the_margin_is_checked(margin: float) -> None:
    with pytest.raises(UsageError, match=r"`margin` must be in \[0, 1\)"):
        HardwareFilter(margin=margin)
