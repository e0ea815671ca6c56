"""The process of `bo`: its prior mean is the sum of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rankNAS.strategies.bayesian.bo import deterministic
from rankNAS.strategies.bayesian.surrogate import (
    FLOOR,
    Inputs,
    equal_shares,
    fitted,
    standardised,
    summed_losses,
)
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.random import Random
from rankNAS.testing import random_problem

LAYERS = 8


def problem_of(objectives: int = 1) -> Problem:
    problem = random_problem(5, layers=LAYERS, choices=16, objectives=objectives)
    losses = tuple(0.1 * (i + 1) * e**1.5 for i, e in enumerate(problem.errors))
    return replace(problem, losses=losses)


def trials(problem: Problem, wrong: Sequence[float], count: int = 12) -> tuple[Trial, ...]:
    """Trials whose divergence is the sum of the losses times what each layer's is wrong by."""
    found: list[Trial] = []
    rng, key = np.random.default_rng(0), problem.budget_key
    while len(found) < count:
        (allocation,) = Random().propose(problem, History(tuple(found)), 1, rng)
        row = problem.indices(allocation)
        h = sum(w * float(t[i]) for w, t, i in zip(wrong, problem.losses, row, strict=True))
        values = (0.5, problem.fractions(row)["macs"] * problem.dense["macs"])
        values = values[: len(problem.objectives)]
        metrics = {"kl_divergence": h}
        found.append(Trial(len(found), allocation, "complete", values, metrics, budget_key=key))
    return tuple(found)


def rows_of(problem: Problem, found: Sequence[Trial]) -> np.ndarray:
    return np.array([problem.indices(t.allocation) for t in found])


def test_summed_losses_are_the_tables_of_the_choices() -> None:
    problem = problem_of()
    row = np.array([[1, 0, 2, 3, 0, 5, 1, 0]])
    expected = sum(float(problem.losses[i][j]) for i, j in enumerate(row[0]))
    assert summed_losses(problem, row) == pytest.approx([expected])
    assert summed_losses(replace(problem, losses=()), row) == pytest.approx(
        [sum(float(problem.errors[i][j]) for i, j in enumerate(row[0]))]
    )


def test_the_prior_mean_at_proposals_is_the_sum_of_the_losses() -> None:
    """Where divergences are thrice the sums, the process expects thrice the sum everywhere."""
    problem = problem_of()
    found = trials(problem, [3.0] * LAYERS)
    rows = rows_of(problem, found)
    targets, priors = standardised(problem, found, rows)
    proposals = rows_of(problem, trials(problem, [1.0] * LAYERS, 30)[12:])
    sums = summed_losses(problem, proposals)
    floor = FLOOR * np.median(summed_losses(problem, rows))
    y = -np.log([t.metrics["kl_divergence"] + 3 * floor for t in found])
    unit = float(np.std(y) / np.std(targets))
    expected = (-np.log(3 * (sums + floor)) - y.mean()) / unit
    assert priors[0](proposals) == pytest.approx(expected, abs=1e-9)
    inputs = Inputs.over(problem, np.zeros(LAYERS, dtype=np.int64), priors, proposals)
    assert inputs.of(proposals)[:, -1].numpy() == pytest.approx(expected, abs=1e-9)
    with deterministic(0):
        X = inputs.of(rows)
        model = fitted(X, torch.from_numpy(targets), X.shape[1] - 1, X.shape[1] - 1)
        mean = model.posterior(inputs.of(proposals)).mean.detach().squeeze(1)
    assert mean.numpy() == pytest.approx(expected, abs=0.05)


def test_a_cost_is_its_own_prior_mean() -> None:
    problem = problem_of(objectives=2)
    found = trials(problem, [1.0] * LAYERS)
    rows = rows_of(problem, found)
    targets, priors = standardised(problem, found, rows)
    assert priors[1](rows) == pytest.approx(targets[:, 1], abs=1e-6)


def test_an_objective_that_the_losses_do_not_explain_has_a_flat_prior_mean() -> None:
    problem = replace(problem_of(), objectives=("taste",))
    found = trials(problem, [1.0] * LAYERS)
    sums = summed_losses(problem, rows_of(problem, found))
    opposed = tuple(replace(t, values=(float(h),)) for t, h in zip(found, sums, strict=True))
    _, (prior,) = standardised(problem, opposed, rows_of(problem, found))
    assert np.ptp(prior(rows_of(problem, found))) == 0
    agreeing = tuple(replace(t, values=(-5 * float(h),)) for t, h in zip(found, sums, strict=True))
    targets, (prior,) = standardised(problem, agreeing, rows_of(problem, found))
    assert prior(rows_of(problem, found)) == pytest.approx(targets[:, 0], abs=1e-6)


def test_groups_have_neighbours_with_equal_parts_of_the_loss() -> None:
    problem = problem_of()
    losses = tuple(np.array([0.0, x]) for x in (4, 1, 1, 1, 1, 2, 1, 1))
    problem = replace(problem.restricted([[0, 1]] * LAYERS), losses=losses)
    groups = equal_shares(problem, np.ones(LAYERS, dtype=np.int64), 3)
    assert groups.tolist() == [0, 1, 1, 1, 1, 2, 2, 2]


def test_what_groups_are_wrong_by_is_learned_from_few_trials() -> None:
    """The losses of the second half are five times too small, which the prior mean cannot know."""
    problem, wrong = problem_of(), [1.0] * 4 + [5.0] * 4
    everything = trials(problem, wrong, 60)
    known, unknown = everything[:12], everything[12:]
    rows, proposals = rows_of(problem, known), rows_of(problem, unknown)
    targets, priors = standardised(problem, known, rows)
    groups = np.repeat([0, 1], 4)
    inputs = Inputs.over(problem, groups, priors, np.concatenate([rows, proposals]))
    with deterministic(0):
        X = inputs.of(rows)
        model = fitted(X, torch.from_numpy(targets), X.shape[1] - 1, X.shape[1] - 1)
        mean = model.posterior(inputs.of(proposals)).mean.detach().squeeze(1).numpy()
    truth = -np.log([t.metrics["kl_divergence"] for t in unknown])
    prior, learned = (spearmanr(x, truth).statistic for x in (priors[0](proposals), mean))
    assert learned > 0.98 > prior
