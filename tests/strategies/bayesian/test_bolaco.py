"""Bolaco: its contract, its surrogate and acquisition in closed form, and its search."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import gpytorch
import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.utils.testing import MockModel, MockPosterior
from scipy.optimize import brentq
from scipy.stats import norm

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import UsageError
from rankNAS.strategies.base import Request
from rankNAS.strategies.bayesian.bolaco import (
    LENGTHS,
    LONGEST,
    SHORTEST,
    Bolaco,
    expected_improvement,
    matern,
    surrogate,
)
from rankNAS.strategies.bayesian.keep_ratios import KeepRatios
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.testing import StrategyContract, random_problem, random_trial


class TestBolaco(StrategyContract):
    strategy = Bolaco(pool=64)
    batch = 2


class TestStaged(StrategyContract):
    strategy = Bolaco(stages=4, pool=32, initial=2, operators=None)
    batch = 2
    problems: ClassVar = {"many_layers": random_problem(4, layers=9)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def transformer(budget: float = 0.6, blocks: int = 4) -> Problem:
    kept = np.linspace(1, 0.05, 39)
    options = (DENSE, *(Choice("svd", (r,)) for r in range(38, 0, -1)))
    names = [f"blocks.{b}.{k}" for b in range(blocks) for k in KINDS]
    sizes = [3.0 if name.endswith(("up_proj", "down_proj")) else 1.0 for name in names]
    return Problem(
        dict.fromkeys(names, options),
        tuple(1 - kept for _ in names),
        {"params": tuple(size * kept for size in sizes)},
        {"params": 0.0},
        {"params": budget},
        objectives=("accuracy",),
        directions=("maximize",),
    )


def trial(problem: Problem, number: int, allocation: Allocation, **metrics: float) -> Trial:
    """Queries and keys hardly matter, down projections do."""
    weight = dict(zip(KINDS, (0.02, 0.02, 3.0, 0.3, 0.5, 2.0), strict=True))
    rows = zip(problem.choices, problem.errors, problem.indices(allocation), strict=True)
    harm = sum(weight[name.rsplit(".", 1)[1]] * float(e[i]) ** 2 for name, e, i in rows)
    found = {"loss": harm, "reverse_kl": 0.0, "accuracy": -harm, **metrics}
    return Trial(number, allocation, "complete", (-harm,), found)


def searched(strategy: Bolaco, problem: Problem, trials: int) -> History:
    history = History()
    for number in range(trials):
        (allocation,) = strategy.propose(problem, history, 1, rng(number))
        done = replace(trial(problem, number, allocation), budget_key=problem.budget_key)
        history = History((*history.trials, done))
    return history


# ------------------------------------------------------------------- surrogate and acquisition


def closed_form(distance: float) -> float:
    """Matern-5/2 of unit length scale."""
    r = math.sqrt(5) * distance
    return (1 + r + r * r / 3) * math.exp(-r)


@pytest.mark.parametrize(("mean", "sigma", "least"), [(1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (2, 1, 0)])
def test_t_c4_expected_improvement(mean: float, sigma: float, least: float) -> None:
    moments = torch.tensor([[[mean]]]).double(), torch.tensor([[[sigma**2]]]).double()
    model = MockModel(MockPosterior(mean=moments[0], variance=moments[1]))
    with torch.no_grad():
        found = expected_improvement(model, least)(torch.zeros(1, 1, 1).double()).exp()
    u = (least - mean) / sigma
    assert float(found) == pytest.approx(sigma * (u * norm.cdf(u) + norm.pdf(u)), rel=1e-6)
    published = {(1.0, 1.0): 0.398942, (0.5, 0.5): 0.541658}
    if (mean, sigma) in published:
        assert float(found) == pytest.approx(published[mean, sigma], abs=1e-6)


def test_t_c4_the_kernel() -> None:
    kernel = matern([1.0, 0.8])
    assert kernel.base_kernel.lengthscale.flatten().tolist() == pytest.approx([1.0, 0.8])
    assert float(kernel.outputscale.detach()) == pytest.approx(2.0)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.8]]).double()
    with torch.no_grad():
        K = kernel(x).to_dense() / 2
    assert closed_form(1.0) == pytest.approx(0.523994, abs=1e-6)
    assert K[0].tolist() == pytest.approx([1, closed_form(1.0), closed_form(1.0)], rel=1e-6)
    assert float(K[1, 2]) == pytest.approx(closed_form(math.sqrt(2)), rel=1e-6)


def test_t_c4_one_noiseless_observation() -> None:
    kernel = matern([1.0])
    kernel.outputscale = 1.0
    half = brentq(lambda d: closed_form(d) - 0.5, 0.5, 2)
    model = SingleTaskGP(
        torch.zeros(1, 1).double(),
        torch.ones(1, 1).double(),
        train_Yvar=torch.full((1, 1), 2e-6).double(),
        covar_module=kernel,
        mean_module=gpytorch.means.ZeroMean(),
        outcome_transform=None,
    )
    posterior = model.posterior(torch.tensor([[half]]).double())
    assert float(posterior.mean.detach()) == pytest.approx(0.5, abs=1e-5)
    assert float(posterior.variance.detach()) == pytest.approx(0.75, abs=1e-5)


def test_the_surrogate_is_its_closed_form() -> None:
    """k^T (K + noise)^-1 h and k(x, x) - k^T (K + noise)^-1 k, on standardised values."""
    torch.manual_seed(0)
    X, x = torch.rand(7, 2).double(), torch.rand(3, 2).double()
    y = 5 + 2 * X.sum(1, keepdim=True).sin()
    model = surrogate(X, y, [0.8, 1.0])
    kernel, constant = model.covar_module, float(model.mean_module.constant.detach())
    lengths = kernel.base_kernel.lengthscale.detach()
    assert (lengths > SHORTEST).all() and (lengths < LONGEST).all()
    with torch.no_grad():
        noise = float(model.likelihood.noise.detach()) * torch.eye(7).double()
        K, k, kxx = (kernel(a, b).to_dense() for a, b in ((X, X), (X, x), (x, x)))
        posterior = model.posterior(x)
    h = (y - y.mean()) / y.std() - constant
    mean = constant + k.T @ torch.linalg.solve(K + noise, h)
    variance = kxx - k.T @ torch.linalg.solve(K + noise, k)
    torch.testing.assert_close(posterior.mean, mean * y.std() + y.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        posterior.variance.flatten(), variance.diagonal() * y.var(), rtol=1e-3, atol=1e-5
    )


def test_length_scales_begin_longer_for_attention() -> None:
    ratios = KeepRatios.of(transformer(), 1)
    assert np.choose(ratios.attention, LENGTHS).tolist() == [1.0, 1.0, 0.8, 0.8]


# -------------------------------------------------------------------------------- the search


def test_the_initial_points_are_the_default_and_far_from_each_other() -> None:
    problem = transformer()
    ratios = KeepRatios.of(problem.within(("svd",)), 1)
    found = Bolaco(initial=3).propose(problem, History(), 3, rng())
    assert found[0] == ratios.default()

    def nearest(allocations: list[Allocation]) -> float:
        points = ratios.kept(problem, np.array([problem.indices(a) for a in allocations]))
        distances = np.linalg.norm(points[:, None] - points[None], axis=2)
        return float(distances[~np.eye(len(points), dtype=bool)].min())

    random = [
        nearest([found[0], *(ratios.problem.allocation(r) for r in ratios.draw(rng(s), 2))])
        for s in range(20)
    ]
    assert nearest(found) > max(random)


def test_values_are_never_compressed_and_the_budget_is_used() -> None:
    problem = transformer()
    for done in searched(Bolaco(pool=64, stages=2), problem, 6).trials:
        for name, choice in done.allocation.items():
            assert choice == DENSE or not name.endswith("v_proj")
        kept = problem.fractions(problem.indices(done.allocation))["params"]
        assert 0.5 - 1e-9 <= kept <= 0.6 * (1 + 1e-9)


def test_layers_of_a_kind_keep_the_same() -> None:
    problem = transformer()
    for done in searched(Bolaco(pool=64), problem, 5).trials:
        for name in KINDS:
            assert len({c for n, c in done.allocation.items() if n.endswith(name)}) == 1
        first = problem.choices["blocks.0.q_proj"]
        assert done.allocation["blocks.0.q_proj"] == done.allocation["blocks.0.k_proj"]
        assert done.allocation["blocks.0.q_proj"] in first


@pytest.mark.slow
def test_it_finds_what_random_search_does_not() -> None:
    problem = transformer()
    ratios = KeepRatios.of(problem.within(("svd",)), 1)
    history = searched(Bolaco(pool=256), problem, 14)
    losses = [t.metrics["loss"] for t in history.trials]
    rows = ratios.draw(rng(1), 300)
    random = [
        trial(problem, 0, ratios.problem.allocation(row)).metrics["loss"] for row in rows.tolist()
    ]
    assert min(losses) < losses[0]
    assert min(losses) < np.quantile(random, 0.01)


def test_the_loss_and_the_divergence_are_minimised_together() -> None:
    problem = transformer()
    a, b = (problem.allocation([i] * len(problem.choices)) for i in (20, 21))
    trials = (
        trial(problem, 0, a, loss=1.0, reverse_kl=0.2),
        trial(problem, 1, b, loss=0.9, reverse_kl=0.6),
    )
    assert Bolaco(divergence_weight=0.5)._value(problem, trials).tolist() == pytest.approx(
        [1.1, 1.2]
    )
    assert Bolaco(divergence_weight=0.0)._value(problem, trials).tolist() == [1.0, 0.9]
    without = tuple(replace(t, metrics={"loss": 1.0}) for t in trials)
    values = [-t.values[0] for t in trials]
    assert Bolaco()._value(problem, without).tolist() == values  # accuracy is to be large
    smaller = replace(problem, directions=("minimize",))
    assert Bolaco()._value(smaller, without).tolist() == [-v for v in values]


def test_equal_results_do_not_stop_it() -> None:
    problem = transformer()
    first = Bolaco(pool=32).propose(problem, History(), 3, rng())
    trials = tuple(Trial(i, a, "complete", (0.5,)) for i, a in enumerate(first))
    assert len(Bolaco(pool=32).propose(problem, History(trials), 2, rng())) == 2


def test_trials_of_another_budget_are_used_but_not_improved_on() -> None:
    """Dense trials are better than all of a smaller budget, whose best is still improved on."""
    high, low = transformer(0.9), transformer(0.5)
    done = searched(Bolaco(pool=64), high, 4).trials
    strategy = Bolaco(pool=64)
    history = History(done)
    for number in range(5):
        (allocation,) = strategy.propose(low, history, 1, rng(number))
        assert low.meets(low.indices(allocation))
        new = replace(trial(low, len(history.trials), allocation), budget_key=low.budget_key)
        history = History((*history.trials, new))
    assert len(history.feasible(low)) == 5


def test_it_stops_when_everything_is_known() -> None:
    problem = replace(random_problem(0, layers=1, choices=3), budget={"macs": 0.99})
    trials = tuple(random_trial(problem, i, problem.allocation([i])) for i in range(3))
    assert Bolaco().propose(problem, History(trials), 2, rng()) == []


def test_what_it_cannot_do_is_refused() -> None:
    request = Request({"params": 0.8}, ["accuracy"], 100)
    Bolaco().check(request)
    with pytest.raises(UsageError, match="use up a budget"):
        Bolaco().check(replace(request, budget={}))
    with pytest.raises(UsageError, match="include macs; give several budgets"):
        Bolaco().check(replace(request, objectives=["accuracy", "macs"]))
    for wrong in ({"stages": 0}, {"pool": 0}, {"initial": 1}, {"divergence_weight": -1.0}):
        with pytest.raises(UsageError, match="must be at least 1"):
            Bolaco(**wrong)
