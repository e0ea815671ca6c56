"""The contract of a strategy, and what it sees: the problem and the history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import Allocation, Choice
from rankNAS.exceptions import BudgetError
from rankNAS.objectives.base import Direction
from rankNAS.solver import SLACK, least_cost, min_max

__all__ = ["History", "Problem", "Strategy", "Trial"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One evaluated allocation.

    Args:
        number: Position in the study, from 0.
        allocation: What was evaluated.
        state: ``complete`` or ``failed``.
        values: The objectives, in the order of the problem; empty if failed.
        metrics: Everything that was measured, by name.
        seconds: How long the evaluation took.
        reason: Why it failed.

    Example:
        >>> from rankNAS.allocation import DENSE
        >>> Trial(0, Allocation.of({"conv1": DENSE}), "complete", (0.9,)).values
        (0.9,)
    """

    number: int
    allocation: Allocation
    state: Literal["complete", "failed"]
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class History:
    """All trials of a study so far, and the allocations that are being evaluated now."""

    trials: tuple[Trial, ...] = ()
    pending: tuple[Allocation, ...] = ()

    @property
    def complete(self) -> tuple[Trial, ...]:
        """The trials that succeeded."""
        return tuple(t for t in self.trials if t.state == "complete")

    @cached_property
    def proposed(self) -> frozenset[Allocation]:
        """Every allocation that was evaluated or is being evaluated."""
        return frozenset(t.allocation for t in self.trials) | frozenset(self.pending)


@dataclass(frozen=True)
class Problem:
    """A search in numbers: tables over layers and choices, budgets and directions.

    Args:
        choices: Choices of each layer by name, in the order of all tables.
        errors: Relative error of each choice, one array a layer.
        costs: By cost name, one array a layer.
        rest: By cost name, the cost of everything outside the layers.
        budget: By cost name, the fraction kept of the dense model's cost.
        objectives: Names of the objectives.
        directions: Their directions.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    errors: tuple[Array, ...]
    costs: Mapping[str, tuple[Array, ...]]
    rest: Mapping[str, float]
    budget: Mapping[str, float]
    objectives: tuple[str, ...] = ("accuracy",)
    directions: tuple[Direction, ...] = ("maximize",)

    @cached_property
    def dense(self) -> dict[str, float]:
        """By cost name, what the dense model costs; dense is the first choice of every layer."""
        return {
            name: self.rest[name] + float(sum(c[0] for c in table))
            for name, table in self.costs.items()
        }

    @cached_property
    def limits(self) -> dict[str, float]:
        """By budgeted cost, what the layers together may cost."""
        return {
            name: fraction * self.dense[name] - self.rest[name]
            for name, fraction in self.budget.items()
        }

    def budgeted(self) -> list[tuple[Array, ...]]:
        """The cost tables that are bounded, in the order of `limits`."""
        return [self.costs[name] for name in self.limits]

    def allocation(self, indices: Sequence[int]) -> Allocation:
        """The allocation of one index per layer."""
        pairs = zip(self.choices.items(), indices, strict=True)
        return Allocation(tuple((name, choices[int(i)]) for (name, choices), i in pairs))

    def indices(self, allocation: Mapping[str, Choice]) -> list[int]:
        """The inverse of `allocation`."""
        return [choices.index(allocation[name]) for name, choices in self.choices.items()]

    def fractions(self, indices: Sequence[int]) -> dict[str, float]:
        """By cost name, the fraction of the dense model's cost that is kept."""
        return {
            name: (self.rest[name] + float(sum(c[i] for c, i in zip(table, indices, strict=True))))
            / self.dense[name]
            for name, table in self.costs.items()
        }

    def meets(self, indices: Sequence[int]) -> bool:
        """Whether every budget holds."""
        fractions = self.fractions(indices)
        return all(fractions[name] <= bound * (1 + SLACK) for name, bound in self.budget.items())

    def check(self) -> None:
        """Raise a BudgetError, naming the smallest possible fraction, if a budget is too small."""
        for name, limit in self.limits.items():
            least = least_cost(self.costs[name])
            if least > limit * (1 + SLACK):
                smallest = (least + self.rest[name]) / self.dense[name]
                raise BudgetError(
                    f"no allocation keeps {name} <= {self.budget[name]:g} of the dense model's; "
                    f"the smallest possible is {_round_up(smallest):g}."
                )
        if len(self.limits) > 1:
            self._check_together()

    def _check_together(self) -> None:
        try:
            min_max(self.errors, self.budgeted(), list(self.limits.values()))
        except BudgetError:
            raise BudgetError(
                f"no allocation meets the budgets {dict(self.budget)} together, although each "
                "can be met alone; raise one of them."
            ) from None


class Strategy(ABC):
    """Proposes allocations.

    `propose` is a pure function of the strategy's configuration and its arguments: what it needs
    to know about earlier proposals it reads from the history. Every proposal is an allocation of
    the problem's space that meets its budgets. An empty list means there is nothing more to
    propose. A strategy must pickle, and is a frozen dataclass of its configuration.

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


def _round_up(fraction: float) -> float:
    return float(np.ceil(fraction * 1e4) / 1e4)
