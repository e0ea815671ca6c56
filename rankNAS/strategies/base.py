"""The contract of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import StudyError
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Array, Problem

if TYPE_CHECKING:
    from rankNAS.evaluation.context import SearchContext

__all__ = ["Array", "History", "Problem", "Request", "Strategy", "Trial"]


@dataclass(frozen=True)
class Request:
    """What a search is asked for, before any work is done.

    Args:
        budget: As in `Problem`.
        objectives: Their names.
        training: Samples that may be trained on.
        classes: Whether the targets are classes.
    """

    budget: Mapping[str, float]
    objectives: Sequence[str]
    training: int
    classes: bool


class Strategy(ABC):
    """Proposes allocations.

    `propose` is a pure function of the strategy's configuration and its arguments: what it needs
    to know about earlier proposals it reads from the history. Every proposal is an allocation of
    the problem's space that meets its budgets. An empty list means there is nothing more to
    propose. A strategy must pickle, and is a frozen dataclass of its configuration.

    Three more methods may be overridden: `check` refuses what the strategy cannot do, `bind`
    takes what it needs to know of the model, and `probes` asks for measurements of allocations
    that need not meet the budgets.

    Attributes:
        name: As given to ``--strategy``.
        operators: Whose choices it uses; None for all.
        needs_latency: Whether it needs the problem's latency table, budgeted or not.
        refits: Whether proposals are evaluated after sequential refitting
            (`rankNAS.compression.reconstruction`), where the settings have that. A trial then
            takes several times longer. Probes are never refitted.

    Example:
        >>> class Dense(Strategy):
        ...     name = "dense"
        ...     def propose(self, problem, history, n, rng):
        ...         allocation = problem.allocation([0] * len(problem.errors))
        ...         return [] if allocation in history.proposed else [allocation]
        >>> Dense().name
        'dense'
    """

    name: str
    operators: tuple[str, ...] | None = None
    needs_latency: bool = False
    refits: bool = False

    def check(self, request: Request) -> None:  # noqa: B027
        """Raise a UsageError if the strategy cannot do what is asked; called before any work."""

    def bind(self, context: SearchContext) -> Strategy:
        """The strategy with what it needs to know of the model; called once a search."""
        return self

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """Allocations to measure before `propose` is called again; they need not meet the budget.

        Probes that are in the history are not measured again, so this may always return the same
        list. A pure function, like `propose`. Neighbours in the list are cheapest to evaluate if
        they agree in the first layers.
        """
        return []

    def select(self, problem: Problem, history: History) -> Trial:
        """The answer to a problem: of the trials that meet its budgets, the best measured one.

        By the first objective; of equals, the one of the smaller loss, then the earlier one.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        trials = history.feasible(problem)
        if not trials:
            raise StudyError(f"no trial of the study has succeeded yet for {problem.budget_key}.")
        sign = problem.signs[0]
        return max(
            trials, key=lambda t: (sign * t.values[0], -t.metrics.get("loss", 0.0), -t.number)
        )

    @abstractmethod
    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """At most n allocations to evaluate next.

        Args:
            problem: Tables, budgets and directions.
            history: What is known.
            n: How many are wanted.
            rng: The only source of randomness.
        """
