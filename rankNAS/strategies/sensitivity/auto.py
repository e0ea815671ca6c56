"""Second-order losses, exact allocation, screened candidates and a learned correction.

The default strategy. It minimises the degradation of the network within the budget.

1. The loss of every choice of every layer, alone and to second order, comes from one pass over the
   calibration samples, whatever the number of layers (`rankNAS.compression.curvature`). With
   `measured`, each layer is measured alone at a few relative errors instead.
2. The exact solver minimises their sum within the budget: the first candidate. Others minimise
   geometric means of losses and relative errors. The mean that explains their measured
   degradation best is the table of the layers from then on.
3. Candidates are screened: evaluated without refitting, on a part of the samples. A regression
   learns from them which layers do more or less harm than the tables say, and how errors
   propagate (`Regression`). The next candidates minimise its mean and samples of its posterior
   (Thompson sampling), until the gain that samples promise is small. Budgets share the
   regression.
4. The best few are refitted and evaluated on all samples. Selection bias grows with the number of
   candidates (winner's curse), so scores are shrunk towards the regression.

With several objectives the first candidates sweep the budget; the Gaussian processes and the
acquisition function of `bo` continue from there, on the same losses.

References:
    Thompson, Biometrika 1933; Russo et al., Foundations and Trends in Machine Learning 2018.
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
from rankNAS.strategies.history import History, Trial, degradation
from rankNAS.strategies.one_shot.solve import Solve, mixed
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem
from rankNAS.strategies.sensitivity.regression import GAP, Regression
from rankNAS.strategies.sensitivity.tables import sensitivity_probes, sensitivity_tables

__all__ = ["Auto"]

SHARES = (1.0, 0.75, 0.5, 0.0)  # powers of the losses in the tables that are compared
ATTEMPTS = 12  # samples drawn for a candidate that is new
WIDENING = 1.3  # of the samples, each time one gives a known allocation
SAMPLES = 6  # of the posterior, that say what further candidates may gain
TINY = 1e-12  # least value of which a logarithm is taken
WALKS = 2  # refits of a further budget, where each is a walk through a network in files
CLOSE = 1.1  # score of a candidate, relative to the best, up to which it is refitted


@final
@dataclass(frozen=True)
class Auto(Strategy):
    """Second-order losses, the exact solver, screened candidates; the best few are refitted.

    Args:
        screened: Candidates that are screened for each budget, at most.
        refitted: Candidates that are refitted for each budget, at most.
        further: The same for budgets after the first one; None is 2 for models that are streamed,
            whose refits are walks through their blocks, and `refitted` for others.
        gain: Relative gain below which no further candidates are screened.
        measured: Measure each layer alone instead of estimating the losses; slower.
        errors: Relative errors at which each layer is measured alone, with `measured`.
        uncertainty: Prior relative standard deviation of a layer's multiplier.
        misfit: Relative standard deviation of the residual of the model.
        shrinkage: Weight of the regression, against the measurement, in scores.

    Raises:
        UsageError: An error outside (0, 1), or a number that is not positive.
    """

    screened: int = 8
    refitted: int = 3
    gain: float = 0.01
    measured: bool = False
    errors: tuple[float, ...] = (0.1, 0.3)
    uncertainty: float = 0.3
    misfit: float = 0.05
    shrinkage: float = 0.5
    further: int | None = None
    name = "auto"
    refits = True
    screens = True
    needs_losses = True

    def __post_init__(self) -> None:
        if not self.errors or not all(0 < e < 1 for e in self.errors):
            raise UsageError(f"`errors` must be in (0, 1), at least one of them: {self.errors}.")
        least = min(self.screened, self.refitted, 1 if self.further is None else self.further)
        if least < 1 or self.gain < 0:
            raise UsageError(
                "`screened`, `refitted` and `further` must be at least 1 and `gain` not negative; "
                f"got {self}."
            )
        if self.uncertainty <= 0 or self.misfit <= 0 or not 0 <= self.shrinkage <= 1:
            raise UsageError(
                "`uncertainty` and `misfit` must be positive and `shrinkage` in [0, 1]; "
                f"got {self}."
            )

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """What is screened next; before it, with `measured`, each layer alone."""
        if self.measured:
            alone = sensitivity_probes(problem, self.errors)
            if any(not history.has(a, probe=True) for a in alone):
                return alone
        elif (dense := problem.allocation(problem.all_dense)) not in history.found:
            return [dense]
        if len(problem.objectives) > 1 or history.candidates(problem):
            return []
        return self._to_screen(problem, history)

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The best screened candidates that have not been refitted."""
        if len(problem.objectives) > 1:
            return self._on_the_front(problem, history, n, rng)
        waiting = [a for a in history.pending if problem.meets(problem.indices(a))]
        tried = history.candidates(problem)
        failed = any(t.state == "failed" for t in tried)
        most = self._refits(problem, history)
        left = most - sum(t.state != "failed" for t in tried) - len(waiting)
        screened = self._screened(problem, history)
        regression = self._regression(problem, history)
        if not screened:  # all failed, or there was none
            starts = dict.fromkeys(self._starts(problem, history, regression))
            return [a for a in starts if a not in history.tried][: max(0, min(n, left))]
        scores = self._scores(problem, regression, screened)
        worst = np.inf if failed else CLOSE * min(scores)
        close = [i for i in np.argsort(scores, kind="stable") if scores[i] <= worst]
        ordered = dict.fromkeys(screened[int(i)].allocation for i in close)
        return [a for a in ordered if a not in history.tried][: max(0, min(n, left))]

    def _refits(self, problem: Problem, history: History) -> int:
        """The number of candidates of a budget that are refitted, at most."""
        key = problem.budget_key
        if not any(not t.probe and t.budget_key != key for t in history.complete):
            return self.refitted
        few = min(WALKS, self.refitted) if problem.streamed else self.refitted
        return few if self.further is None else self.further

    def select(self, problem: Problem, history: History) -> Trial:
        """The refitted trial of the best score; if there is none, the best screened one.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        feasible = history.feasible(problem)
        trials = [t for t in feasible if not t.probe] or list(feasible)
        if not trials:
            raise StudyError(f"no trial of the study has succeeded yet for {problem.budget_key}.")
        scores = self._scores(problem, self._regression(problem, history), trials)
        return trials[int(np.argmin(scores))]

    def _to_screen(self, problem: Problem, history: History) -> list[Allocation]:
        """The next candidates to screen; empty when further ones promise little."""
        screened = self._screened(problem, history)
        regression = self._regression(problem, history)
        key = problem.budget_key
        own = [t for t in history.trials if t.probe and t.budget_key == key]
        own = [
            t for t in own if _joint(problem, t) and problem.meets(problem.indices(t.allocation))
        ]
        if not own or not screened:
            starts = dict.fromkeys(self._starts(problem, history, regression))
            return list(starts)[: self.screened]
        if len(own) >= self.screened:
            return []
        scores = self._scores(problem, regression, screened)
        best = problem.indices(screened[int(np.argmin(scores))].allocation)
        rng = np.random.default_rng(len(history.trials))
        samples = [regression.sample(rng) for _ in range(SAMPLES)]
        optima = [sample.optimum(problem) for sample in samples]
        gains = [_gain(problem, s, best, found) for s, found in zip(samples, optima, strict=True)]
        if float(np.mean(gains)) < self.gain:
            return []
        for found in (regression.optimum(problem), *optima):
            if (allocation := problem.allocation(found)) not in history.found:
                return [allocation]
        return self._widened(problem, history, regression, rng)

    def _starts(
        self, problem: Problem, history: History, regression: Regression
    ) -> Iterator[Allocation]:
        """What is screened before any sample."""
        yield problem.allocation(regression.optimum(problem))
        budgeted, limits = problem.budgeted(), list(problem.limits.values())
        for table in self._tables(problem, history):
            yield problem.allocation(min_sum(table, budgeted, limits, gap=GAP).indices)

    def _widened(
        self,
        problem: Problem,
        history: History,
        regression: Regression,
        rng: np.random.Generator,
    ) -> list[Allocation]:
        """A new optimum of a sample; samples spread more each time that one is known."""
        spread = WIDENING
        for _ in range(ATTEMPTS):
            allocation = problem.allocation(regression.sample(rng, spread).optimum(problem))
            if allocation not in history.found:
                return [allocation]
            spread *= WIDENING
        return []

    def _screened(self, problem: Problem, history: History) -> list[Trial]:
        """The successful probes of a budget that meet it, those of other budgets included."""
        return [t for t in history.feasible(problem) if t.probe]

    def _scores(
        self, problem: Problem, regression: Regression, trials: Sequence[Trial]
    ) -> list[float]:
        """Degradations, shrunk towards the regression up to a common factor."""
        measured = np.array([degradation(problem, t) for t in trials]) - regression.base
        rows = [problem.indices(t.allocation) for t in trials]
        predicted = regression.predict(problem, rows) - regression.base
        usable = (measured > 0) & (predicted > 0)
        if usable.any():  # refitted trials are better than the screened ones of the regression
            predicted = predicted * float(np.median(measured[usable] / predicted[usable]))
        scores: list[float] = (
            self.shrinkage * predicted + (1 - self.shrinkage) * measured
        ).tolist()
        return scores

    def _losses(self, problem: Problem, history: History) -> tuple[Array, ...]:
        if self.measured:
            return sensitivity_tables(problem, history, self.errors) or problem.absolute
        return problem.absolute

    def _tables(self, problem: Problem, history: History) -> list[tuple[Array, ...]]:
        """The means of losses and errors that are compared; the losses come first."""
        losses = self._losses(problem, history)
        return [mixed(problem, losses, share) for share in SHARES]

    def _table(
        self, problem: Problem, history: History, trials: Sequence[Trial]
    ) -> tuple[Array, ...]:
        """The mean of losses and errors that explains the screened trials of a budget best."""
        tables = self._tables(problem, history)
        own = [t for t in trials if t.budget_key == problem.budget_key]
        if len(own) < len(SHARES):
            return tables[0]
        rows = [problem.indices(t.allocation) for t in own]
        measured = np.log([max(degradation(problem, t), TINY) for t in own])
        residuals = []
        for table in tables:
            sums = [sum(h[i] for h, i in zip(table, row, strict=True)) for row in rows]
            residuals.append(float(np.std(measured - np.log(np.maximum(sums, TINY)))))
        return tables[int(np.argmin(residuals))]

    def _regression(self, problem: Problem, history: History) -> Regression:
        dense = history.found.get(problem.allocation(problem.all_dense))
        measured = dense is not None and dense.state == "complete"
        trials = [t for t in history.complete if t.probe and _joint(problem, t)]
        return Regression.fit(
            problem,
            self._table(problem, history, trials),
            degradation(problem, dense) if dense is not None and measured else 0.0,
            trials,
            uncertainty=self.uncertainty,
            misfit=self.misfit,
        )

    def _on_the_front(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """Solutions of a sweep of budgets, then the proposals of `bo`, on the losses."""
        losses = self._losses(problem, history)
        largest = max(float(table.max()) for table in losses) or 1.0
        # `bo` takes errors to be at most 1.
        scaled = replace(problem, errors=tuple(table / largest for table in losses), losses=())
        solved = Solve(form="relative").propose(scaled, history, n, rng)
        return solved or BayesianOptimisation().propose(scaled, history, n, rng)


def _joint(problem: Problem, trial: Trial) -> bool:
    """Whether several layers are compressed; others measure the dense model or a layer alone."""
    return sum(index != DENSE_INDEX for index in problem.indices(trial.allocation)) > 1


def _gain(
    problem: Problem, sample: Regression, best: Sequence[int], found: Sequence[int]
) -> float:
    """The share of the degradation that an allocation saves if a sample is right."""
    now, then = sample.predict(problem, [best, found]) - sample.base
    return max(0.0, float((now - then) / now)) if now > 0 else 0.0
