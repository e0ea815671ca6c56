"""Bayesian optimisation of an allocation, on the budget by construction, from the losses on.

The second-order losses of the layers, summed, are the prior mean of a Gaussian process in a few
dimensions (`rankNAS.strategies.bayesian.surrogate`). The acquisition function is maximised over a
pool of allocations. Each is the least weighted sum of the losses within the budget, decoded from
multipliers of a few groups of layers and of some single ones (`decode`), around the best
allocations found and at large. The first proposals are the optima of `solve` and `energy`.

References:
    Eriksson et al., NeurIPS 2019: candidates that perturb a few dimensions of the best point.
    The process and the acquisition functions: see `rankNAS.strategies.bayesian.surrogate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from rankNAS.allocation import Allocation
from rankNAS.deadline import check_time
from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.solver.pareto import non_dominated
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.decode import Indices, additive_preference, decode
from rankNAS.strategies.bayesian.surrogate import (
    Inputs,
    acquisition,
    equal_shares,
    standardised,
)
from rankNAS.strategies.history import History, rankings
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.solve import Solve
from rankNAS.strategies.problem import Array, Problem
from rankNAS.threads import one_thread

__all__ = ["BayesianOptimisation", "deterministic"]

SINGLE = 0.15  # deviation of the log-multipliers of single layers, relative to that of groups


@final
@dataclass(frozen=True)
class BayesianOptimisation(Strategy):
    """Gaussian process on the summed losses, log expected improvement, on the budget.

    Args:
        initial: Trials before the process takes over: the optima of `solve` and `energy`, and
            perturbations of the first.
        pool: Preferences decoded for each proposal.
        groups: Groups of neighbouring layers, with equal parts of the loss of the optimum, whose
            multipliers and shares are the dimensions of the search.
        spread: Standard deviation of the groups' log-multipliers drawn at large.
        local: Share of the pool drawn around the best allocations.

    Raises:
        UsageError: A number that is not positive, or `local` outside [0, 1].
    """

    initial: int = 4
    pool: int = 512
    groups: int = 4
    spread: float = 0.5
    local: float = 0.75
    name = "bo"
    endless = True
    needs_losses = True

    def __post_init__(self) -> None:
        least = min(self.initial, self.groups, self.pool - 1)
        if least < 1 or self.spread <= 0 or not 0 <= self.local <= 1:
            raise UsageError(
                "`initial` must be at least 1, `groups` too, `pool` at least 2, `spread` positive "
                f"and `local` in [0, 1]; got {self}."
            )

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        found = [a for a in _starts(problem) if a not in history.proposed][:n]
        if len(found) == n:
            return found
        taken = history.proposed | set(found)
        problems = _tightened(problem, rng)
        groups = equal_shares(problem, _optimum(problems[0]), self.groups)
        if len(history.feasible(problem)) < self.initial:
            drawn = _unseen(problem, problems, self._at_large(groups, rng), taken, rng)
            return found + [problem.allocation(row.tolist()) for row in drawn[: n - len(found)]]
        preferences = self._preferences(problem, problems[0], history, groups, rng)
        pool = _unseen(problem, problems, preferences, taken, rng)
        if len(pool) == 0:
            return found
        seed = int(rng.integers(2**31))
        chosen = _maximise(problem, history, groups, pool, n - len(found), seed)
        return found + [problem.allocation(pool[i].tolist()) for i in chosen]

    def _at_large(self, groups: Indices, rng: np.random.Generator) -> Array:
        """Multipliers (pool, L): of groups, and a little of each layer."""
        common = rng.normal(0, self.spread, (self.pool, self.groups))
        single = rng.normal(0, SINGLE * self.spread, (self.pool, len(groups)))
        return np.exp(common[:, groups] + single)

    def _preferences(
        self,
        problem: Problem,
        budgeted: Problem,
        history: History,
        groups: Indices,
        rng: np.random.Generator,
    ) -> Array:
        """Part around the best allocations, at three scales, some in few layers; the rest wide."""
        best = np.array([problem.indices(t.allocation) for t in _best(problem, history, 5)])
        centres = additive_preference(_by_loss(budgeted), best)
        count, L = int(self.pool * self.local), len(groups)
        drawn = centres[np.arange(count) % len(centres)]
        scale = rng.choice([0.25, 0.5, 1.0], (count, 1)) * self.spread
        changed = rng.random((count, L)) < np.maximum(rng.choice([0.1, 0.3], (count, 1)), 1 / L)
        common = rng.normal(0, 1, (count, self.groups))[:, groups]
        single = rng.normal(0, 1, (count, L)) * changed
        moved = np.where(rng.random((count, 1)) < 0.5, common, single)
        return np.concatenate(
            [drawn * np.exp(moved * scale), self._at_large(groups, rng)[: self.pool - count]]
        )


def _starts(problem: Problem) -> list[Allocation]:
    """The optima of the tables: of the summed losses, and of the errors."""
    return list(dict.fromkeys([*Solve().solutions(problem), Energy().solve(problem)]))


def _by_loss(problem: Problem) -> Problem:
    """The problem with the losses as its errors."""
    return replace(problem, errors=problem.absolute)


def _optimum(problem: Problem) -> Indices:
    """The allocation (L,) of about the least summed losses."""
    ones = np.ones((1, len(problem.errors)))
    row: Indices = decode(_by_loss(problem), ones, np.random.default_rng(0), additive=True)[0]
    return row


def _unseen(
    problem: Problem,
    problems: list[Problem],
    preferences: Array,
    taken: Set[Allocation],
    rng: np.random.Generator,
) -> Indices:
    """The distinct allocations of the preferences that nobody has tried, (pool, L)."""
    parts = np.array_split(preferences, len(problems))
    rows = np.concatenate(
        [_decoded(_by_loss(p), part, rng) for p, part in zip(problems, parts, strict=True)]
    )
    _, order = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(order)]
    fresh = [problem.allocation(row.tolist()) not in taken for row in rows]
    unseen: Indices = rows[np.array(fresh, dtype=bool)]
    return unseen


def _decoded(problem: Problem, preferences: Array, rng: np.random.Generator) -> Indices:
    """As `decode`, but empty where a tightened set of budgets cannot be met."""
    check_time()
    try:
        return decode(problem, preferences, rng, additive=True)
    except BudgetError:
        return np.zeros((0, len(problem.errors)), dtype=np.int64)


def _tightened(problem: Problem, rng: np.random.Generator) -> list[Problem]:
    """The problem; or, where a cost is an objective, problems with budgets down to the least.

    On the budget's edge alone there would be no trade-off to explore.
    """
    traded = [name for name in problem.objectives if name in problem.costs]
    if not traded:
        return [problem]
    budget = dict(problem.budget) or {traded[0]: 1.0}
    name = traded[0] if traded[0] in budget else next(iter(budget))
    least = problem.least(name)
    shares = np.exp(rng.uniform(np.log(least), np.log(budget[name]), 8))
    bounds = [budget[name], *np.maximum(shares, least)]
    return [replace(problem, budget=budget | {name: float(b)}) for b in bounds]


def _best(problem: Problem, history: History, count: int) -> list[Any]:
    """The trials of the largest value; with several objectives, those that are not dominated."""
    trials = history.feasible(problem)
    values = rankings(problem, trials)
    if values.shape[1] > 1:
        front = non_dominated(values)
        return [t for t, keep in zip(trials, front, strict=True) if keep]
    order = np.argsort(-values[:, 0], kind="stable")
    return [trials[i] for i in order[:count]]


def _maximise(
    problem: Problem, history: History, groups: Indices, pool: Indices, n: int, seed: int
) -> list[int]:
    """Positions in the pool that greedily maximise the acquisition function."""
    with deterministic(seed):
        trials = history.complete
        rows = np.array([problem.indices(t.allocation) for t in trials])
        targets, priors = standardised(problem, trials, rows)
        inputs = Inputs.over(problem, groups, priors, np.concatenate([rows, pool]))
        X, Y, candidates = inputs.of(rows), torch.from_numpy(targets), inputs.of(pool)
        met = torch.tensor([problem.meets(row) for row in rows.tolist()])
        pending = [problem.indices(a) for a in history.pending]
        waiting = inputs.of(np.array(pending)) if pending else None
        acquired = acquisition(X, Y, met, waiting, seed)
        chosen: list[int] = []
        for _ in range(min(n, len(pool))):
            check_time()
            with torch.no_grad():
                scores = torch.cat([acquired(c.unsqueeze(1)) for c in candidates.split(256)])
            scores[chosen] = -torch.inf
            chosen.append(int(scores.argmax()))
            waiting = _joined(waiting, candidates[chosen[-1:]])
            acquired.set_X_pending(waiting)
        return chosen


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Own random numbers, and one thread: small matrices, and workers that do not fight."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_thread():
        # Deprecations inside the libraries, and jitter that they add to covariances by themselves.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="A not p.d., added jitter")
        # Prior means are inputs too.
        warnings.filterwarnings("ignore", message="Data \\(input features\\) is not contained")
        torch.manual_seed(seed)
        yield


def _joined(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.cat([a, b])
