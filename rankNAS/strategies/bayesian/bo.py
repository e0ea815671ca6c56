"""Bayesian optimisation over per-layer choices, on the budget by construction.

A Gaussian process models each objective as a function of the layers' relative errors. The
acquisition function is maximised over a pool of allocations, each decoded from a preference by the
exact solver (`decode`), so every modelled point
meets the budgets. Preferences are drawn around the best allocations found and at large; the first
proposals are those of `energy` and `uniform`.

References:
    Balandat et al., NeurIPS 2020 (BoTorch). Ament et al., NeurIPS 2023: log expected improvement.
    Daulton et al., NeurIPS 2021: noisy expected hypervolume improvement, for several objectives.
    Hvarfner et al., ICML 2024: length scales that grow with the dimension (BoTorch's default).
    Eriksson et al., NeurIPS 2019: candidates that perturb a few dimensions of the best point.
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
from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.solver.pareto import non_dominated
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.decode import Indices, decode, preference
from rankNAS.strategies.history import History, rankings
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.uniform import Uniform
from rankNAS.strategies.problem import Array, Problem
from rankNAS.threads import one_thread

__all__ = ["BayesianOptimisation", "deterministic"]

STARTS = (Energy(), Uniform())
FIT_ITERATIONS = 50  # of L-BFGS; later ones change the hyper-parameters, not the choice


@final
@dataclass(frozen=True)
class BayesianOptimisation(Strategy):
    """Gaussian process and log expected improvement over allocations on the budget.

    Args:
        initial: Trials before the process takes over: the min-max allocation, that of equal
            shares, and perturbations of the first.
        pool: Preferences decoded for each proposal.
        spread: Standard deviation of the log-multipliers of preferences drawn at large.
        local: Share of the pool drawn around the best allocations.

    Raises:
        UsageError: A number that is not positive, or `local` outside [0, 1].
    """

    initial: int = 6
    pool: int = 512
    spread: float = 0.35
    local: float = 0.75
    name = "bo"
    endless = True

    def __post_init__(self) -> None:
        if self.initial < 1 or self.pool < 2 or self.spread <= 0 or not 0 <= self.local <= 1:
            raise UsageError(
                "`initial` must be at least 1, `pool` at least 2, `spread` positive and `local` "
                f"in [0, 1]; got {self}."
            )

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        starts = dict.fromkeys(start.solve(problem) for start in STARTS)
        found = [a for a in starts if a not in history.proposed][:n]
        if len(found) == n:
            return found
        taken = history.proposed | set(found)
        if len(history.feasible(problem)) < self.initial:
            drawn = self._unseen(problem, self._at_large(problem, rng), taken, rng)
            return found + [problem.allocation(row.tolist()) for row in drawn[: n - len(found)]]
        pool = self._unseen(problem, self._preferences(problem, history, rng), taken, rng)
        if len(pool) == 0:
            return found
        chosen = _maximise(problem, history, pool, n - len(found), int(rng.integers(2**31)))
        return found + [problem.allocation(pool[i].tolist()) for i in chosen]

    def _at_large(self, problem: Problem, rng: np.random.Generator) -> Array:
        size = (self.pool, len(problem.errors))
        return np.exp(rng.normal(0, self.spread, size))

    def _preferences(self, problem: Problem, history: History, rng: np.random.Generator) -> Array:
        """Part around the best allocations, some layers changed at three scales; the rest wide."""
        best = np.array([problem.indices(t.allocation) for t in _best(problem, history, 5)])
        centres = preference(problem, best)
        count, L = int(self.pool * self.local), len(problem.errors)
        drawn = centres[np.arange(count) % len(centres)]
        scale = rng.choice([0.25, 0.5, 1.0], (count, 1)) * 2 * self.spread
        changed = rng.random((count, L)) < np.maximum(
            rng.choice([0.1, 0.3, 1.0], (count, 1)), 1 / L
        )
        local = drawn * np.exp(rng.normal(0, 1, (count, L)) * scale * changed)
        return np.concatenate([local, self._at_large(problem, rng)[: self.pool - count]])

    def _unseen(
        self,
        problem: Problem,
        preferences: Array,
        taken: Set[Allocation],
        rng: np.random.Generator,
    ) -> Indices:
        """The distinct allocations of the preferences that nobody has tried, (pool, L)."""
        problems = _tightened(problem, rng)
        parts = np.array_split(preferences, len(problems))
        rows = np.concatenate(
            [_decoded(p, part, rng) for p, part in zip(problems, parts, strict=True)]
        )
        _, order = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(order)]
        fresh = [problem.allocation(row.tolist()) not in taken for row in rows]
        unseen: Indices = rows[np.array(fresh, dtype=bool)]
        return unseen


def _decoded(problem: Problem, preferences: Array, rng: np.random.Generator) -> Indices:
    """As `decode`, but empty where a tightened set of budgets cannot be met."""
    try:
        return decode(problem, preferences, rng)
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


def _features(problem: Problem, rows: Indices) -> Tensor:  # (P, L) -> (P, L), in [0, 1]
    """Square root of each layer's relative error: the loss is nearly additive and smooth in it."""
    errors = np.stack([e[rows[:, i]] for i, e in enumerate(problem.errors)], axis=1)
    return torch.from_numpy(np.sqrt(np.clip(errors, 0, 1)))


def _maximise(problem: Problem, history: History, pool: Indices, n: int, seed: int) -> list[int]:
    """Positions in the pool that greedily maximise the acquisition function."""
    with deterministic(seed):
        trials = history.complete
        X = _features(problem, np.array([problem.indices(t.allocation) for t in trials]))
        Y = torch.from_numpy(rankings(problem, trials))
        met = torch.tensor([problem.meets(problem.indices(t.allocation)) for t in trials])
        candidates = _features(problem, pool)
        pending = [problem.indices(a) for a in history.pending]
        waiting = _features(problem, np.array(pending)) if pending else None
        acquisition = _acquisition(X, Y, met, waiting, seed)
        chosen: list[int] = []
        for _ in range(min(n, len(pool))):
            with torch.no_grad():
                scores = torch.cat([acquisition(c.unsqueeze(1)) for c in candidates.split(256)])
            scores[chosen] = -torch.inf
            chosen.append(int(scores.argmax()))
            waiting = _joined(waiting, candidates[chosen[-1:]])
            acquisition.set_X_pending(waiting)
        return chosen


def _acquisition(X: Tensor, Y: Tensor, met: Tensor, waiting: Tensor | None, seed: int) -> Any:
    """The acquisition function, on a process fitted to the trials (X, Y).

    What is to be improved on are those of them that met the budget.
    """
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.models.transforms import Standardize
    from botorch.sampling.normal import SobolQMCNormalSampler
    from gpytorch.mlls import ExactMarginalLogLikelihood

    models = []
    for y in Y.split(1, dim=1):
        y = y + 0.0 if float(y.std()) > 0 else y + 1e-9 * torch.arange(len(y)).unsqueeze(1)
        model = SingleTaskGP(X, y, outcome_transform=Standardize(1))
        fit_gpytorch_mll(
            ExactMarginalLogLikelihood(model.likelihood, model),
            optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}},
        )
        models.append(model)
    sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed % 2**31)
    if len(models) == 1:
        return qLogNoisyExpectedImprovement(
            models[0], X[met], sampler=sampler, X_pending=waiting, prune_baseline=True
        )
    span = Y.max(0).values - Y.min(0).values
    return qLogNoisyExpectedHypervolumeImprovement(
        ModelListGP(*models),
        ref_point=(Y.min(0).values - 0.1 * span).tolist(),
        X_baseline=X[met],
        sampler=sampler,
        X_pending=waiting,
        prune_baseline=True,
    )


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Own random numbers, and one thread: small matrices, and workers that do not fight."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_thread():
        # Deprecations inside the libraries, and jitter that they add to covariances by themselves.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="A not p.d., added jitter")
        torch.manual_seed(seed)
        yield


def _joined(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.cat([a, b])
