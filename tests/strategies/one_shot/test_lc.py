"""The allocation step of learning-compression: optimality of a price, the budget, the energies."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankNAS
from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.decompositions.norms import NORMS
from rankNAS.search_spaces import compile_space
from rankNAS.strategies.one_shot.lc import LearningCompression, c_step
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import make_spectra
from rankNAS.testing import StrategyContract, random_problem

seeds = st.integers(0, 10**6)


class TestLearningCompression(StrategyContract):
    strategy = LearningCompression()


class TestLearningCompressionOfEverything(StrategyContract):
    strategy = LearningCompression(relative=True, operators=None)


def total(table: tuple[np.ndarray, ...], indices: tuple[int, ...] | list[int]) -> float:
    return float(sum(t[i] for t, i in zip(table, indices, strict=True)))


def single(errors: list[float], costs: dict[str, list[float]], kept: dict[str, float]) -> Problem:
    """One layer whose choices are dense and ranks."""
    choices = (DENSE, *(Choice("svd", (r,)) for r in range(len(errors) - 1, 0, -1)))
    tables = {name: (np.array(cost),) for name, cost in costs.items()}
    remainder_cost = dict.fromkeys(costs, 0.0)
    return Problem({"a": choices}, (np.array(errors),), tables, remainder_cost, kept)


def test_t_a5_ranks_of_a_price_per_rank() -> None:
    """Spectra (1, .5, .25, .125) and (1, .9, .8, .7); lambda x cost is 0.1 per rank."""
    values = [np.array([1, 0.5, 0.25, 0.125]), np.array([1, 0.9, 0.8, 0.7])]
    tails = [np.array([(s[r:] ** 2).sum() for r in range(1, 5)]) for s in values]
    cost = np.arange(1.0, 5)
    picked = c_step(tails, [cost, cost], 0.1)
    assert [i + 1 for i in picked] == [2, 4]
    least = [0.1 * cost[i] + e[i] for e, i in zip(tails, picked, strict=True)]
    assert least == pytest.approx([0.278125, 0.4])


def test_the_price_decides_between_error_and_cost() -> None:
    left, cost = [np.array([0.0, 0.5, 0.5])], [np.array([4.0, 2.0, 1.0])]
    assert c_step(left, cost, 0.0) == [0]
    assert c_step(left, cost, 1e9) == [2]
    assert c_step([np.array([0.5, 0.5])], [np.array([1.0, 2.0])], 0.0) == [0]  # the cheaper


@settings(max_examples=60, deadline=None)
@given(seed=seeds, layers=st.integers(1, 4), choices=st.integers(2, 6))
def test_no_allocation_of_that_cost_has_less_energy(seed: int, layers: int, choices: int) -> None:
    """Everett's theorem: what minimises energy + lambda x cost is optimal at its own cost."""
    problem = random_problem(seed, layers=layers, choices=choices)
    found = problem.indices(LearningCompression().solve(problem))
    (costs,) = problem.budgeted()
    assert problem.meets(found)
    space = itertools.product(range(choices), repeat=layers)
    within = [i for i in space if total(costs, i) <= total(costs, found) * (1 + 1e-12)]
    assert total(problem.errors, found) == pytest.approx(
        min(total(problem.errors, i) for i in within), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, layers=st.integers(1, 6))
def test_a_larger_budget_leaves_out_no_more_energy(seed: int, layers: int) -> None:
    problem = random_problem(seed, layers=layers, choices=10)
    least = problem.fractions([int(c.argmin()) for c in problem.costs["macs"]])["macs"]
    left = []
    for kept in np.linspace(least, 1, 6):
        at = Problem(
            problem.choices,
            problem.errors,
            problem.costs,
            problem.remainder_cost,
            {"macs": float(kept)},
        )
        left.append(total(at.errors, at.indices(LearningCompression().solve(at))))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(left))
    assert left[-1] == 0


def test_choices_above_the_convex_hull_are_out_of_reach() -> None:
    costs = {"macs": [10.0, 6, 1]}
    above = single([0, 0.9, 1], costs, {"macs": 0.6})
    assert above.indices(LearningCompression().solve(above)) == [2]
    below = single([0, 0.3, 1], costs, {"macs": 0.6})
    assert below.indices(LearningCompression().solve(below)) == [1]


def test_several_budgets_that_no_price_meets_are_met_by_the_least_energy() -> None:
    """The cheapest in the sum of both costs breaks one budget, whatever the price."""
    costs = {"macs": [8.0, 2.0, 1.0], "params": [8.0, 0.1, 1.0]}
    problem = single([0, 0.5, 0.9], costs, {"macs": 1 / 8, "params": 1 / 8})
    assert problem.indices(LearningCompression().solve(problem)) == [2]


def test_no_budget_keeps_everything() -> None:
    problem = random_problem(0, budgets=0)
    assert set(LearningCompression().solve(problem).values()) == {DENSE}


def two_layers(errors: float) -> Problem:
    """Two layers alike, one of which must give up half."""
    choices = (DENSE, Choice("svd", (1,)))
    return Problem(
        {"a": choices, "b": choices},
        (np.array([0, errors]), np.array([0, errors])),
        {"macs": (np.array([2.0, 1.0]),) * 2},
        {"macs": 0.0},
        {"macs": 0.75},
    )


def test_absolute_energies_spare_the_layer_of_large_weights() -> None:
    problem = two_layers(0.5)
    for energies, indices in [({"a": 1.0, "b": 9.0}, [1, 0]), ({"a": 9.0, "b": 1.0}, [0, 1])]:
        assert problem.indices(LearningCompression(energies=energies).solve(problem)) == indices
    alike = LearningCompression(relative=True, energies={"a": 1.0, "b": 9.0}).solve(problem)
    assert alike == LearningCompression(relative=True, energies={"a": 9.0, "b": 1.0}).solve(
        problem
    )


@pytest.mark.parametrize("norm", NORMS)
def test_error_times_energy_is_what_is_left_out(small_net: nn.Module, norm: str) -> None:
    inputs = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    space = compile_space(small_net, inputs[:1])
    statistics = calibrate(small_net, space, inputs, norm=norm)
    factorisation = factorise(small_net, space, statistics, norm=norm)
    strategy = LearningCompression().bind(make_spectra(factorisation, ("energy",)))
    assert isinstance(strategy, LearningCompression)
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    for name, found in factorisation.layers.items():
        W = found.weight.double().flatten(2)
        H, C = found.norm.H, _moment(norm, statistics, name)
        H = torch.eye(W.shape[1]).double()[None] if H is None else H
        C = torch.eye(W.shape[2]).double()[None] if C is None else C
        direct = torch.einsum("goi,gij,goj->", H @ W, C, H @ W)
        assert strategy.energies[name] == pytest.approx(float(direct), rel=1e-4)
        assert strategy.energies[name] == found.energy


def _moment(norm: str, statistics: dict[str, object], name: str) -> torch.Tensor | None:
    if norm == "weight":
        return None
    if norm == "asvd":  # it is not centred
        return statistics[name].input_second_moment
    mean = statistics[name].mean
    return statistics[name].input_second_moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def test_the_search_binds_and_meets_the_budget(small_net: nn.Module, small_data: object) -> None:
    study = rankNAS.search(
        small_net,
        small_data,
        budget={"macs": 0.5},
        strategy=LearningCompression(),
        n_trials=2,
        settings=rankNAS.Settings(calibration=64, validation=50),
    )
    assert len(study.trials) == 1
    assert set(study.strategy.energies) == set(study.problems[0].choices)
    assert study.best.metrics["macs"] <= 0.5 * study.dense["macs"]
