"""What evaluated allocations say about the tables: multipliers of layers, propagation.

The degradation of an allocation is modelled as

    base + s (sum_l m_l h_l + b sum_l h_l R_l),  R_l = mean over all layers of the errors before l

with the loss h_l of each layer's choice from the tables, a multiplier m_l for each layer, and a
propagation term: a layer whose inputs are changed already does more harm. The scale s is common to
all layers; m and b have a Gaussian prior around 1 and 0 and are updated in closed form. Trials of
all budgets count; those of other sizes of degradation count less.

References:
    Bishop, Pattern Recognition and Machine Learning 2006, section 3.3: the posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies.history import Trial, degradation
from rankNAS.strategies.problem import Array, Problem

__all__ = ["Regression"]

LEAST = 0.05  # multiplier of a layer, relative to that all layers share
LARGEST = 2.0  # logarithm of how far a sample may be from the mean
GAP = 1e-3  # of the solver, far below what samples differ by
PROPAGATION = 1.0  # prior standard deviation of b
LINEARISATIONS = 4  # of the propagation term, at most, for each optimum
NEAR = 2.0  # factor within which degradations are of one size


@dataclass(frozen=True)
class Regression:
    """The degradation of an allocation, from the losses of its layers.

    Args:
        losses: One array a layer.
        errors: Relative errors, one array a layer.
        base: Degradation of the dense model.
        mean: Posterior mean of the multipliers and of b, both times s, (L + 1,).
        root: A square root of their posterior covariance, (L + 1, L + 1).
    """

    losses: tuple[Array, ...]
    errors: tuple[Array, ...]
    base: float
    mean: Array
    root: Array

    @classmethod
    def fit(
        cls,
        problem: Problem,
        losses: tuple[Array, ...],
        base: float,
        trials: Sequence[Trial],
        *,
        uncertainty: float,
        misfit: float,
    ) -> Regression:
        """The posterior after some trials.

        Args:
            problem: Its errors and budgets; the size of degradation that matters is that of the
                tables' optimum within its budgets.
            losses: The tables.
            base: Degradation of the dense model.
            trials: Evaluated allocations.
            uncertainty: Prior relative standard deviation of a multiplier.
            misfit: Relative standard deviation of the residual.
        """
        L = len(losses)
        deviation = np.array([uncertainty] * L + [PROPAGATION])
        unit = np.append(np.ones(L), 0.0)
        prior = cls(losses, problem.errors, base, unit, np.diag(deviation))
        X = prior.features(problem, trials)
        usable = X.sum(1) > 0
        if not usable.any():
            return prior
        X, y = X[usable], np.array([degradation(problem, t) for t in trials])[usable] - base
        sums = X[:, :L].sum(1)
        wanted = prior.predict(problem, [prior.optimum(problem)])[0] - base
        distance = np.abs(np.log(sums / max(wanted, 1e-12 * sums.max())))
        near = distance <= np.log(NEAR) if (distance <= np.log(NEAR)).any() else distance >= 0
        scale = max(float(np.median((y / sums)[near])), 1e-3)
        X = scale * X
        spread = misfit * (1 + distance)
        noise = np.diag((spread * np.maximum(np.abs(y), 1e-3 * X.sum(1))) ** 2)
        covariance = np.diag(deviation**2)
        gain = np.linalg.solve(X @ covariance @ X.T + noise, X @ covariance).T
        values, vectors = np.linalg.eigh(covariance - gain @ X @ covariance)
        mean = np.maximum(unit + gain @ (y - X @ unit), np.append(np.full(L, LEAST), 0.0))
        root = scale * vectors * np.sqrt(values.clip(0))
        return cls(losses, problem.errors, base, scale * mean, root)

    def features(self, problem: Problem, trials: Sequence[Trial]) -> Array:
        """By trial, the loss of each layer and the propagation term, (trials, L + 1)."""
        rows = [self._features(problem.indices(t.allocation)) for t in trials]
        return np.array(rows, dtype=float).reshape(len(trials), len(self.losses) + 1)

    def _features(self, indices: Sequence[int]) -> Array:
        h = np.array([table[i] for table, i in zip(self.losses, indices, strict=True)])
        return np.append(h, h @ self._before(indices))

    def _before(self, indices: Sequence[int]) -> Array:
        """The errors before each layer, over the number of layers, (L,)."""
        r = np.array([table[i] for table, i in zip(self.errors, indices, strict=True)])
        before: Array = (np.cumsum(r) - r) / len(r)
        return before

    def predict(self, problem: Problem, allocations: Sequence[Sequence[int]]) -> Array:
        """Expected degradation of allocations given as indices, (allocations,)."""
        rows = np.array([self._features(indices) for indices in allocations])
        expected: Array = self.base + rows @ self.mean
        return expected

    def sample(self, rng: np.random.Generator, spread: float = 1.0) -> Regression:
        """The regression with a sample of the posterior as its mean.

        It is taken for log-normal, which keeps it positive.
        """
        mean = np.maximum(self.mean, 1e-12)
        drawn = self.root @ rng.standard_normal(len(mean)) / mean
        sampled = mean * np.exp(np.clip(spread * drawn, -LARGEST, LARGEST))
        # b may be 0: its sample is Gaussian, and not negative.
        b = self.mean[-1] + spread * float(self.root[-1] @ rng.standard_normal(len(mean)))
        return Regression(
            self.losses, self.errors, self.base, np.append(sampled[:-1], max(b, 0.0)), self.root
        )

    def optimum(self, problem: Problem) -> tuple[int, ...]:
        """The allocation of the least expected degradation within the budgets, as indices.

        Without propagation it is exact. The propagation term is linearised around one optimum
        after another, as long as the expected degradation falls.
        """
        limits, budgeted = list(problem.limits.values()), problem.budgeted()
        multipliers, b = self.mean[:-1], float(self.mean[-1])
        tables = [m * h for m, h in zip(multipliers, self.losses, strict=True)]
        best = tuple(min_sum(tables, budgeted, limits, gap=GAP).indices)
        if b <= 0:
            return best
        least = self.predict(problem, [best])[0]
        for _ in range(LINEARISATIONS):
            h = np.array([table[i] for table, i in zip(self.losses, best, strict=True)])
            before = self._before(best)
            behind = (h.sum() - np.cumsum(h)) / len(h)
            linear = [
                table + b * (before[i] * self.losses[i] + behind[i] * self.errors[i])
                for i, table in enumerate(tables)
            ]
            found = tuple(min_sum(linear, budgeted, limits, gap=GAP).indices)
            value = self.predict(problem, [found])[0]
            if found == best or value >= least:
                break
            best, least = found, value
        return best
