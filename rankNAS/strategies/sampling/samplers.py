"""Optuna samplers over preferences: black-box optimisers whose proposals lie on the budget.

The search variables are one log-multiplier a layer, decoded by the exact solver (`decode`), so
that every proposal lies on the budget; where a cost is an objective, the budget on it is one more
variable. An Optuna study is rebuilt from the history for every proposal: of an evaluated
allocation, the variables are recovered from its errors and its cost.

References:
    Akiba et al., KDD 2019 (Optuna).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState, create_trial

from rankNAS.allocation import Allocation
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.decode import decode_best, lowered, lowered_by, preference
from rankNAS.strategies.history import History, rankings
from rankNAS.strategies.problem import Problem

__all__ = ["Sampled"]

WIDTH = 1.5  # log-multipliers lie in [-WIDTH, WIDTH]
SHARE = "share"  # the variable of the budget; those of the layers are their positions


class Sampled(Strategy):
    """A strategy that asks an Optuna sampler.

    It sees the trials that were proposed for the problem's budgets only: under another budget,
    the same preference is another allocation. A draw that gives an allocation that was seen
    before is repeated; after `attempts` of them, draws are uniform.
    """

    attempts: int

    @abstractmethod
    def _sampler(self, seed: int) -> BaseSampler:
        """A fresh sampler."""

    def _attributes(self, position: int) -> dict[str, Any]:
        """What the sampler expects on the trial at a position among the successful ones."""
        return {}

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        variables = _variables(problem)
        seed = int(rng.integers(2**31))
        found: list[Allocation] = []
        with _quiet():
            study = self._study(problem, history, variables)
            for sampler in (self._sampler(seed), RandomSampler(seed)):
                study.sampler = sampler
                for _ in range(self.attempts * (n - len(found))):
                    row = _decoded(problem, study.ask(variables).params)
                    if row is None:
                        continue
                    allocation = problem.allocation(row.tolist())
                    if allocation not in history.proposed and allocation not in found:
                        found.append(allocation)
                    if len(found) == n:
                        return found
        return found

    def _study(
        self, problem: Problem, history: History, variables: Mapping[str, BaseDistribution]
    ) -> optuna.Study:
        # The ranks are this study's values; what was asked for stays in the study on disk.
        study = optuna.create_study(directions=["maximize"] * len(problem.objectives))
        complete = [t for t in history.candidates(problem) if t.state == "complete"]
        ranks = rankings(problem, complete).tolist()
        for position, (trial, values) in enumerate(zip(complete, ranks, strict=True)):
            study.add_trial(
                create_trial(
                    values=values,
                    params=_recovered(problem, trial.allocation),
                    distributions=dict(variables),
                    system_attrs=self._attributes(position),
                )
            )
        for allocation in history.pending:
            study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=_recovered(problem, allocation),
                    distributions=dict(variables),
                )
            )
        return study


def _variables(problem: Problem) -> dict[str, BaseDistribution]:
    variables: dict[str, BaseDistribution] = {
        str(i): FloatDistribution(-WIDTH, WIDTH) for i in range(len(problem.errors))
    }
    if any(name in problem.costs for name in problem.objectives):
        variables[SHARE] = FloatDistribution(0, 1)
    return variables


def _decoded(problem: Problem, values: Mapping[str, float]) -> np.ndarray[Any, Any] | None:
    """The allocation (L,) that variables stand for; None if a lowered budget cannot be met."""
    logarithms = np.array([values[str(i)] for i in range(len(problem.errors))])
    swept = lowered(problem, values[SHARE]) if SHARE in values else problem
    return decode_best(swept, np.exp(logarithms))


def _recovered(problem: Problem, allocation: Allocation) -> dict[str, float]:
    """The variables that an allocation stands for, centred on the layers that are not exact."""
    indices = np.array(problem.indices(allocation))
    logarithms = np.log(preference(problem, indices[np.newaxis])[0])
    pairs = zip(problem.errors, indices, strict=True)
    inexact = np.array([errors[i] > 0 for errors, i in pairs])
    logarithms -= logarithms[inexact].mean() if inexact.any() else logarithms
    clipped = np.clip(logarithms, -WIDTH, WIDTH)
    values = {str(i): float(x) for i, x in enumerate(clipped)}
    if SHARE in _variables(problem):
        values[SHARE] = lowered_by(problem, indices)
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither Optuna's log nor its warnings that constant liars and added trials are new."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)
