"""Measured sensitivities, exact allocation, Bayesian correction from evaluated candidates.

The default strategy. It minimises the degradation of the network within the budget.

1. Each layer is compressed alone at a few relative errors; this gives its sensitivity table.
2. The exact solver minimises the sum of sensitivities within the budget: the first candidate.
3. Candidates are evaluated after sequential refitting, which recovers different amounts per
   layer; a regression learns the correction. It is a Bayesian linear regression on one multiplier
   per layer, with the measured sensitivities as its prior mean, updated in closed form. The next
   candidate minimises its mean or, if that is known already, a posterior sample (Thompson
   sampling). Every candidate lies on the budget.
4. Selection bias grows with the number of candidates (winner's curse). The solution is therefore
   the candidate with the best score after shrinking measurements towards the regression.

With several objectives the first candidates sweep the budget; the Gaussian processes and the
acquisition function of `bo` continue from there, on the measured sensitivities.

References:
    Thompson, Biometrika 1933; Russo et al., Foundations and Trends in Machine Learning 2018.
    Bishop, Pattern Recognition and Machine Learning 2006, section 3.3: the posterior.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.bo import BayesianOptimisation
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.solve import Solve
from rankNAS.strategies.problem import Array, Problem
from rankNAS.strategies.sensitivity.tables import (
    degradation,
    sensitivity_probes,
    sensitivity_tables,
)

__all__ = ["Auto"]

STARTS = (Solve(), Energy())  # tried in addition, in case the sensitivities mislead
ATTEMPTS = 12  # samples drawn for a proposal that is new
WIDENING = 1.3  # of the samples, each time one gives a known allocation
LEAST = 0.05  # multiplier of a layer, relative to that all layers share
LARGEST = 2.0  # logarithm of how far a sample may be from the mean
GAP = 1e-3  # of the solver, far below what samples differ by


@final
@dataclass(frozen=True)
class Auto(Strategy):
    """Measured sensitivities, the exact solver, and Thompson sampling of layer multipliers.

    Args:
        errors: Relative errors at which each layer is measured alone.
        uncertainty: Prior relative standard deviation of a layer's multiplier.
        misfit: Relative standard deviation of the residual of the additive model.
        shrinkage: Weight of the regression, against the measurement, in `select`.

    Raises:
        UsageError: An error outside (0, 1), or a number that is not positive.
    """

    errors: tuple[float, ...] = (0.1, 0.3)
    uncertainty: float = 0.3
    misfit: float = 0.05
    shrinkage: float = 0.5
    name = "auto"
    refits = True

    def __post_init__(self) -> None:
        if not self.errors or not all(0 < e < 1 for e in self.errors):
            raise UsageError(f"`errors` must be in (0, 1), at least one of them: {self.errors}.")
        if self.uncertainty <= 0 or self.misfit <= 0 or not 0 <= self.shrinkage <= 1:
            raise UsageError(
                "`uncertainty` and `misfit` must be positive and `shrinkage` in [0, 1]; "
                f"got {self}."
            )

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """The dense model and each layer alone."""
        return sensitivity_probes(problem, self.errors)

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """First the optimum of the measured sensitivities, then those of posterior samples."""
        if len(problem.objectives) > 1:
            return self._on_the_front(problem, history, n, rng)
        regression = self._regression(problem, history)
        found: list[Allocation] = []
        starts = _starts(problem, regression)
        while len(found) < n and (allocation := next(starts, None)) is not None:
            if allocation not in history.proposed and allocation not in found:
                found.append(allocation)
        spread = 1.0
        for _ in range(ATTEMPTS * n):
            if len(found) == n:
                break
            allocation = regression.solve(problem, regression.sample(rng, spread))
            if allocation in history.proposed or allocation in found:
                spread *= WIDENING
            else:
                found.append(allocation)
        return found

    def select(self, problem: Problem, history: History) -> Trial:
        """The trial with the least degradation, measurements shrunk towards the regression.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        trials = history.feasible(problem)
        if not trials:
            raise StudyError(f"no trial of the study has succeeded yet for {problem.budget_key}.")
        predicted = self._regression(problem, history).predict(problem, trials)
        measured = np.array([degradation(problem, t) for t in trials])
        score = self.shrinkage * predicted + (1 - self.shrinkage) * measured
        return trials[int(np.argmin(score))]

    def _regression(self, problem: Problem, history: History) -> _Regression:
        dense = history.found.get(problem.allocation(problem.all_dense))
        measured = dense is not None and dense.state == "complete"
        return _Regression.fit(
            problem,
            sensitivity_tables(problem, history, self.errors) or problem.errors,
            degradation(problem, dense) if dense is not None and measured else 0.0,
            [t for t in history.complete if not t.probe],
            self.uncertainty,
            self.misfit,
        )

    def _on_the_front(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """Solutions of a sweep of budgets, then the proposals of `bo`, on the sensitivities."""
        sensitivity = sensitivity_tables(problem, history, self.errors) or problem.errors
        largest = max(float(table.max()) for table in sensitivity) or 1.0
        # `bo` takes errors to be at most 1.
        scaled = replace(problem, errors=tuple(table / largest for table in sensitivity))
        solved = Solve().propose(scaled, history, n, rng)
        return solved or BayesianOptimisation().propose(scaled, history, n, rng)


def _starts(problem: Problem, regression: _Regression) -> Iterator[Allocation]:
    """What is proposed before any sample; solved one by one, as each is an integer programme."""
    yield regression.solve(problem, regression.mean)
    for start in STARTS:
        yield start.solve(problem)


@dataclass(frozen=True)
class _Regression:
    """The degradation of an allocation as a weighted sum of layer sensitivities.

    Args:
        sensitivity: One array a layer.
        base: Degradation of the dense model.
        mean: Posterior mean of the layers' multipliers, (L,).
        root: A square root of their posterior covariance, (L, L).
    """

    sensitivity: tuple[Array, ...]
    base: float
    mean: Array
    root: Array

    @classmethod
    def fit(
        cls,
        problem: Problem,
        sensitivity: tuple[Array, ...],
        base: float,
        trials: Sequence[Trial],
        uncertainty: float,
        misfit: float,
    ) -> _Regression:
        """The posterior after some trials; independent multipliers around 1 before them."""
        L = len(sensitivity)
        prior = cls(sensitivity, base, np.ones(L), uncertainty * np.eye(L))
        X = prior.sums(problem, trials)  # (trials, L)
        usable = X.sum(1) > 0
        if not usable.any():
            return prior
        X, y = X[usable], np.array([degradation(problem, t) for t in trials])[usable] - base
        # A factor common to all layers: sensitivities do not add up exactly.
        common = max(float(np.median(y / X.sum(1))), 1e-3)
        X = common * X
        noise = np.diag((misfit * np.maximum(np.abs(y), 1e-3 * X.sum(1))) ** 2)
        covariance = uncertainty**2 * np.eye(L)
        gain = np.linalg.solve(X @ covariance @ X.T + noise, X @ covariance).T
        values, vectors = np.linalg.eigh(covariance - gain @ X @ covariance)
        mean = np.maximum(np.ones(L) + gain @ (y - X.sum(1)), LEAST)
        return cls(sensitivity, base, common * mean, common * vectors * np.sqrt(values.clip(0)))

    def sums(self, problem: Problem, trials: Sequence[Trial]) -> Array:
        """The sensitivity of each layer in each trial's allocation, (trials, L)."""
        rows = [problem.indices(t.allocation) for t in trials]
        found = [[h[i] for h, i in zip(self.sensitivity, row, strict=True)] for row in rows]
        return np.array(found, dtype=float).reshape(len(trials), len(self.sensitivity))

    def predict(self, problem: Problem, trials: Sequence[Trial]) -> Array:
        """Expected degradation of the trials, (trials,)."""
        expected: Array = self.base + self.sums(problem, trials) @ self.mean
        return expected

    def sample(self, rng: np.random.Generator, spread: float) -> Array:
        """Multipliers (L,) from the posterior, taken for log-normal to keep them positive."""
        drawn = self.root @ rng.standard_normal(len(self.mean)) / self.mean
        multipliers: Array = self.mean * np.exp(np.clip(spread * drawn, -LARGEST, LARGEST))
        return multipliers

    def solve(self, problem: Problem, multipliers: Array) -> Allocation:
        """The allocation with the least weighted sum of sensitivities, exact."""
        tables = [m * h for m, h in zip(multipliers, self.sensitivity, strict=True)]
        limits = list(problem.limits.values())
        return problem.allocation(min_sum(tables, problem.budgeted(), limits, gap=GAP).indices)
