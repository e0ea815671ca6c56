"""Losses solved exactly, screened candidates, what is learned from them, and refitted ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies.history import History, Trial, degradation
from rankNAS.strategies.one_shot.solve import mixed
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sensitivity.auto import Auto
from rankNAS.strategies.sensitivity.tables import sensitivity_probes, sensitivity_tables
from rankNAS.testing import StrategyContract, random_problem


class TestAuto(StrategyContract):
    strategy = Auto()


class TestAutoMeasured(StrategyContract):
    strategy = Auto(measured=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def power_law(problem: Problem, seed: int) -> list[np.ndarray]:
    """True harms a e^b of a made-up network, very different between layers."""
    draw = rng(seed)
    a = np.exp(draw.uniform(-3, 1, len(problem.errors)))
    b = draw.uniform(0.8, 3, len(problem.errors))
    return [ai * e**bi for ai, bi, e in zip(a, b, problem.errors, strict=True)]


def measured(
    problem: Problem, allocation: Allocation, sensitivity: list[np.ndarray], number: int = 0
) -> Trial:
    """A trial whose divergence is the sum of the harms, and whose accuracy says nothing."""
    total = float(sum(h[i] for h, i in zip(sensitivity, problem.indices(allocation), strict=True)))
    metrics = {"kl_divergence": total, "accuracy": 0.5}
    return Trial(number, allocation, "complete", (0.5,), metrics, budget_key=problem.budget_key)


def screened(
    strategy: Auto,
    problem: Problem,
    sensitivity: list[np.ndarray],
    history: History | None = None,
) -> History:
    """The history once nothing more is to be screened."""
    history = history or History()
    while wanted := [a for a in strategy.probes(problem, history) if a not in history.found]:
        for allocation in wanted:
            trial = measured(problem, allocation, sensitivity, len(history.trials))
            history = History((*history.trials, replace(trial, probe=True)))
    return history


def alone(strategy: Auto, problem: Problem, sensitivity: list[np.ndarray]) -> History:
    """The history of the dense model and each layer alone."""
    probes = sensitivity_probes(problem, strategy.errors)
    trials = [measured(problem, a, sensitivity, i) for i, a in enumerate(probes)]
    return History(tuple(replace(t, probe=True) for t in trials))


def test_probes_are_dense_and_one_layer_at_a_time_in_an_order_that_shares_prefixes() -> None:
    problem = random_problem(4, layers=5)
    probes = sensitivity_probes(problem, (0.1, 0.3))
    rows = [problem.indices(a) for a in probes]
    assert rows == sorted(rows) and rows[0] == [0] * 5
    assert all(sum(i > 0 for i in row) == 1 for row in rows[1:])
    for layer, table in enumerate(problem.errors):
        found = {row[layer] for row in rows if row[layer]}
        nearest = {1 + int(np.argmin(np.abs(table[1:] - e))) for e in (0.1, 0.3)}
        assert found == nearest


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(2, 6))
def test_a_power_law_is_recovered_and_its_optimum_proposed_first(seed: int, layers: int) -> None:
    problem = random_problem(seed, layers=layers)
    errors = (0.05, 0.6)
    apart = all(
        len({int(np.argmin(np.abs(t[1:] - e))) for e in errors}) == 2 for t in problem.errors
    )
    if not apart:  # two points are needed for a power law
        return
    sensitivity, strategy = power_law(problem, seed), Auto(errors=errors, measured=True)
    history = alone(strategy, problem, sensitivity)
    tables = sensitivity_tables(problem, history, errors)
    assert tables is not None
    largest = max(degradation(problem, t) for t in history.trials)
    for table, truth in zip(tables, sensitivity, strict=True):
        assert table[0] == 0 and (table[1:] > 0).all()
        if truth[1:].min() > 1e-3 * largest:
            np.testing.assert_allclose(table, truth, rtol=1e-6)
    best = min_sum(tables, problem.budgeted(), list(problem.limits.values()))
    first = strategy.probes(problem, history)[0]
    value = sum(t[i] for t, i in zip(tables, problem.indices(first), strict=True))
    assert value <= best.value * (1 + 2e-3) + 1e-5 * largest  # what HiGHS takes for equal


def with_losses(problem: Problem, losses: list[np.ndarray]) -> Problem:
    return replace(problem, losses=tuple(losses))


def test_the_first_candidates_are_the_optima_of_all_forms() -> None:
    problem = random_problem(10, layers=5, choices=12)
    problem = with_losses(problem, power_law(problem, 2))
    strategy = Auto()
    dense = problem.allocation(problem.all_dense)
    assert strategy.probes(problem, History()) == [dense]
    trial = replace(measured(problem, dense, list(problem.losses)), probe=True)
    first = strategy.probes(problem, History((trial,)))
    assert 1 < len(first) <= 5 and all(problem.meets(problem.indices(a)) for a in first)
    value = sum(t[i] for t, i in zip(problem.losses, problem.indices(first[0]), strict=True))
    best = min_sum(problem.losses, problem.budgeted(), list(problem.limits.values())).value
    assert value <= best * (1 + 2e-3)
    relative = min_sum(problem.errors, problem.budgeted(), list(problem.limits.values()))
    assert problem.allocation(relative.indices) in first


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_table_is_the_mean_that_explains_the_candidates(share: float) -> None:
    problem = random_problem(10, layers=6, choices=12)
    problem = with_losses(problem, power_law(problem, 3))
    truth = mixed(problem, problem.losses, share)
    history = screened(Auto(gain=0.0), problem, list(truth))
    found = Auto()._regression(problem, history).losses
    for table, wanted in zip(found, truth, strict=True):
        np.testing.assert_allclose(table, wanted)


def test_learns_multipliers_that_the_tables_did_not_show() -> None:
    """Among others, one layer harms ten times as much as alone: candidates come to spare it."""
    problem = random_problem(10, layers=6, choices=12)
    tables = [table.copy() for table in problem.errors]
    problem = with_losses(problem, tables)
    together = [10 * t if i == 2 else t for i, t in enumerate(tables)]
    strategy = Auto(screened=25, uncertainty=1.0)
    history = screened(strategy, problem, together)
    optimum = min_sum(together, problem.budgeted(), list(problem.limits.values())).value
    probes = [t for t in history.trials if problem.meets(problem.indices(t.allocation))]
    assert degradation(problem, probes[0]) > 1.2 * optimum
    (best,) = strategy.propose(problem, history, 1, rng())
    assert degradation(problem, measured(problem, best, together)) < 1.1 * optimum


def test_screening_stops_when_little_is_to_be_gained() -> None:
    problem = random_problem(8, layers=9, choices=16)
    problem = with_losses(problem, power_law(problem, 4))
    truth = list(problem.losses)
    few, many = (
        len(screened(Auto(screened=30, gain=gain), problem, truth).trials) for gain in (0.5, 0.0)
    )
    assert few < many <= 31


def test_the_best_few_are_refitted_and_no_more() -> None:
    problem = random_problem(9, layers=5, choices=10)
    problem = with_losses(problem, power_law(problem, 5))
    truth = list(problem.losses)
    strategy = Auto(refitted=2)
    history = screened(strategy, problem, truth)
    least = min(
        degradation(problem, t)
        for t in history.trials
        if problem.meets(problem.indices(t.allocation))
    )
    for step in range(5):
        proposals = strategy.propose(problem, history, 1, rng(step))
        for proposal in proposals:
            trial = measured(problem, proposal, truth, len(history.trials))
            assert degradation(problem, trial) <= 1.2 * least
            history = History((*history.trials, trial))
    refitted = [t for t in history.trials if not t.probe]
    assert 1 <= len(refitted) <= 2
    assert strategy.probes(problem, history) == []
    assert not strategy.select(problem, history).probe


def test_a_further_budget_learns_from_the_earlier_ones() -> None:
    problem = random_problem(10, layers=6, choices=12)
    tables = [table.copy() for table in problem.errors]
    together = [10 * t if i == 2 else t for i, t in enumerate(tables)]
    problem = with_losses(problem, tables)
    strategy = Auto(screened=20, uncertainty=1.0)
    history = screened(strategy, problem, together)
    (kept,) = problem.budget.values()
    tighter = replace(problem, budget={"macs": kept - 0.3 * (kept - problem.least("macs"))})
    optimum = min_sum(together, tighter.budgeted(), list(tighter.limits.values())).value
    fresh = strategy.probes(tighter, History(history.trials[:1]))[0]
    carried = strategy.probes(tighter, history)[0]
    values = [degradation(tighter, measured(tighter, a, together)) for a in (fresh, carried)]
    assert values[1] < 0.9 * values[0] and values[1] < 1.2 * optimum


def test_the_answer_is_not_the_luckiest_measurement() -> None:
    problem = random_problem(5, layers=4)
    problem = with_losses(problem, power_law(problem, 1))
    truth = list(problem.losses)
    strategy = Auto()
    history = screened(strategy, problem, truth)
    probes = [t for t in history.trials if problem.meets(problem.indices(t.allocation))]
    trials = [replace(t, probe=False, number=100 + i) for i, t in enumerate(probes)]
    worst = max(trials, key=lambda t: t.metrics["kl_divergence"])
    best = min(t.metrics["kl_divergence"] for t in trials)
    lucky = replace(worst, metrics=worst.metrics | {"kl_divergence": 0.98 * best})
    told = History((*history.trials, *(lucky if t is worst else t for t in trials)))
    assert worst.metrics["kl_divergence"] > 1.5 * best
    assert strategy.select(problem, told).allocation != worst.allocation
    assert replace(strategy, shrinkage=0.0).select(problem, told).allocation == worst.allocation


def test_an_objective_of_the_users_is_what_is_modelled() -> None:
    problem = replace(random_problem(2, layers=3), objectives=("mine",), directions=("minimize",))
    allocation = problem.allocation([0, 0, 0])
    trial = Trial(0, allocation, "complete", (3.0,), {"kl_divergence": 0.1})
    assert degradation(problem, trial) == 3.0
    assert degradation(replace(problem, directions=("maximize",)), trial) == -3.0
    assert degradation(replace(problem, objectives=("accuracy",)), trial) == 0.1


def test_failed_probes_leave_a_strategy_that_works() -> None:
    problem = random_problem(6, layers=4)
    strategy = Auto(measured=True)
    probes = strategy.probes(problem, History())
    failed = History(tuple(Trial(i, a, "failed", probe=True) for i, a in enumerate(probes)))
    assert sensitivity_tables(problem, failed, strategy.errors) is None
    assert 1 <= len(strategy.propose(problem, failed, 2, rng())) <= 2
    sensitivity = power_law(problem, 3)
    some = [measured(problem, a, sensitivity, i) for i, a in enumerate(probes)]
    rows = [problem.indices(t.allocation) for t in some]
    kept = [
        replace(t, state="failed", values=(), metrics={}) if row[1] else t
        for t, row in zip(some, rows, strict=True)
    ]
    tables = sensitivity_tables(problem, History(tuple(kept)), strategy.errors)
    assert tables is not None and (tables[1][1:] > 0).all()  # the layer whose probes failed
    with pytest.raises(StudyError, match="no trial"):
        strategy.select(problem, failed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"errors": ()},
        {"errors": (0.0,)},
        {"uncertainty": 0},
        {"misfit": -1},
        {"shrinkage": 2},
        {"screened": 0},
        {"refitted": 0},
        {"gain": -0.1},
    ],
)
def test_configuration_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Auto(**wrong)  # type: ignore[arg-type]


def test_proposals_are_measured_as_the_networks_that_are_handed_out(
    small_net: nn.Module, small_data: tuple[TensorDataset, TensorDataset]
) -> None:
    study = rankNAS.search(
        small_net,
        small_data,
        budget={"macs": 0.5},
        strategy=Auto(),
        n_trials=2,
        settings=rankNAS.Settings(calibration=200, validation=60, screening=100),
    )
    assert sum(not t.probe for t in study.trials) >= 1
    few = study.evaluator._few
    assert few is not None and (len(few.calibration), len(few.validation)) == (100, 60)
    for trial in study.trials:
        network = study.materialise(trial.allocation)
        refitted = network_metrics(network, study.splits.validation, study.task)["loss"]
        plain = study.evaluator.evaluate(trial.allocation, screening=trial.probe)["loss"]
        expected = plain if trial.probe else refitted
        assert trial.metrics["loss"] == pytest.approx(expected, rel=1e-4)
        if not trial.probe:
            assert plain != pytest.approx(refitted, rel=2e-4)
