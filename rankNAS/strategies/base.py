"""The contract of a strategy, and what it sees: the problem, the history and the workbench."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import Allocation, Choice
from rankNAS.budget import budget_key
from rankNAS.exceptions import BudgetError, StudyError
from rankNAS.objectives.base import Direction
from rankNAS.renamed import renamed
from rankNAS.solver.pareto import pareto_filter
from rankNAS.solver.programmes import SLACK, least_cost, min_max

if TYPE_CHECKING:
    from rankNAS.evaluation.context import SearchContext

__all__ = ["History", "Problem", "Request", "Strategy", "Trial"]

Array = npt.NDArray[np.float64]


@renamed(target="budget_key")
@dataclass(frozen=True)
class Trial:
    """One evaluated allocation.

    Args:
        number: Position in the study, from 0.
        allocation: What was evaluated.
        state: ``complete``, ``failed``, or ``pruned`` if it was stopped early.
        values: The objectives, in the order of the problem; empty unless complete.
        metrics: Everything that was measured, by name.
        seconds: How long the evaluation took.
        reason: Why it failed or was stopped.
        probe: Whether it was evaluated to learn from it, whatever its cost.
        budget_key: The label of the budget that it was proposed for.

    Example:
        >>> from rankNAS.allocation import DENSE
        >>> Trial(0, Allocation.of({"conv1": DENSE}), "complete", (0.9,)).values
        (0.9,)
    """

    number: int
    allocation: Allocation
    state: Literal["complete", "failed", "pruned"]
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    probe: bool = False
    budget_key: str = ""


@dataclass(frozen=True)
class History:
    """All trials of a study so far, and the allocations that are being evaluated now."""

    trials: tuple[Trial, ...] = ()
    pending: tuple[Allocation, ...] = ()

    def extended(self, *trials: Trial) -> History:
        """With further trials; what is known of the earlier ones is not looked at again."""
        return self._with(History((*self.trials, *trials), self.pending), trials)

    def awaiting(self, pending: Sequence[Allocation]) -> History:
        """With other allocations that are being evaluated."""
        return self._with(History(self.trials, tuple(pending)), ())

    def _with(self, later: History, trials: Sequence[Trial]) -> History:
        """Hand what was computed on to a later history, so that a trial costs the same always."""
        later.__dict__["_filtered"] = self._filtered
        if "complete" in self.__dict__:
            found = tuple(t for t in trials if t.state == "complete")
            later.__dict__["complete"] = self.complete + found
        if "found" in self.__dict__:
            later.__dict__["found"] = self.found | {t.allocation: t for t in trials}
        return later

    @cached_property
    def _filtered(self) -> dict[int | str, tuple[Problem, int, tuple[Trial, ...]]]:
        return {}

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """The trials that succeeded, probes and those proposed for other budgets included."""
        return tuple(t for t in self.trials if t.state == "complete")

    @cached_property
    def found(self) -> dict[Allocation, Trial]:
        """The trials, failed ones too, by their allocation."""
        return {t.allocation: t for t in self.trials}

    def feasible(self, problem: Problem) -> tuple[Trial, ...]:
        """The successful trials that meet a problem's budgets, whatever they were made for."""

        def wanted(trial: Trial) -> bool:
            done = trial.state == "complete"
            return done and problem.meets(problem.indices(trial.allocation))

        return self._filter(id(problem), problem, wanted)

    def candidates(self, problem: Problem) -> tuple[Trial, ...]:
        """The trials, failed ones too, that were proposed for a problem's budgets."""
        budget_key = problem.budget_key
        return self._filter(
            budget_key, problem, lambda t: not t.probe and t.budget_key == budget_key
        )

    def _filter(
        self, key: int | str, problem: Problem, wanted: Callable[[Trial], bool]
    ) -> tuple[Trial, ...]:
        """The trials that are wanted; those that were looked at before are not again."""
        _, seen, known = self._filtered.get(key, (problem, 0, ()))
        if seen > len(self.trials):  # of a later history
            seen, known = 0, ()
        found = known + tuple(t for t in self.trials[seen:] if wanted(t))
        # The problem is kept too: as long as it lives, no other one has its id.
        self._filtered[key] = (problem, len(self.trials), found)
        return found

    @cached_property
    def proposed(self) -> Set[Allocation]:
        """Every allocation that was evaluated or is being evaluated."""
        waiting: dict[Allocation, Any] = dict.fromkeys(self.pending)
        return ChainMap(waiting, self.found).keys()


@renamed(label="budget_key", rest="remainder_cost")
@dataclass(frozen=True)
class Problem:
    """A search in numbers: tables over layers and choices, budgets and directions.

    Args:
        choices: Choices of each layer by name, in the order of all tables.
        errors: Relative error of each choice, one array a layer.
        costs: By cost name, one array a layer.
        remainder_cost: By cost name, the cost of everything outside the layers.
        budget: By cost name, the fraction kept of the dense model's cost.
        objectives: Names of the objectives.
        directions: Their directions.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    errors: tuple[Array, ...]
    costs: Mapping[str, tuple[Array, ...]]
    remainder_cost: Mapping[str, float]
    budget: Mapping[str, float]
    objectives: tuple[str, ...] = ("accuracy",)
    directions: tuple[Direction, ...] = ("maximize",)

    @property
    def budget_key(self) -> str:
        """The budgets in words: ``macs<=0.5``, or ``dense`` without any."""
        return budget_key(self.budget)

    @cached_property
    def signs(self) -> Array:
        """By objective, what to multiply a value by so that larger is better."""
        return np.array([1.0 if d == "maximize" else -1.0 for d in self.directions])

    @cached_property
    def dense(self) -> dict[str, float]:
        """By cost name, what the dense model costs; dense is the first choice of every layer."""
        return {
            name: self.remainder_cost[name] + float(sum(c[0] for c in table))
            for name, table in self.costs.items()
        }

    @cached_property
    def limits(self) -> dict[str, float]:
        """By budgeted cost, what the layers together may cost."""
        return {
            name: fraction * self.dense[name] - self.remainder_cost[name]
            for name, fraction in self.budget.items()
        }

    def within(self, operators: Sequence[str] | None) -> Problem:
        """The problem with only the choices of some operators that are worth their cost.

        Args:
            operators: Their names; None allows all. A layer that none of them can decompose stays
                dense. Of the choices that are left, those that another beats in error and in every
                cost that is budgeted or an objective are dropped.
        """
        names = [n for n in self.costs if n in self.budget or n in self.objectives] or ["macs"]
        kept = []
        for i, choices in enumerate(self.choices.values()):
            allowed = [
                j
                for j, c in enumerate(choices)
                if j == 0 or operators is None or c.operator in operators
            ]
            columns = [self.costs[n][i][allowed] for n in names]
            found = pareto_filter(self.errors[i][allowed], columns, len(allowed))
            kept.append(sorted({0, *(allowed[j] for j in found)}))
        return self.restricted(kept)

    def restricted(self, kept: Sequence[Sequence[int]]) -> Problem:
        """The problem with only some choices of each layer.

        Args:
            kept: One sequence of indices a layer, dense first.
        """
        pairs = zip(self.choices.items(), kept, strict=True)
        return replace(
            self,
            choices={name: tuple(choices[j] for j in keep) for (name, choices), keep in pairs},
            errors=tuple(e[list(keep)] for e, keep in zip(self.errors, kept, strict=True)),
            costs={
                name: tuple(c[list(keep)] for c, keep in zip(table, kept, strict=True))
                for name, table in self.costs.items()
            },
        )

    def labels(self) -> dict[str, list[str]]:
        """The choices of each layer in words."""
        return {name: [str(c) for c in choices] for name, choices in self.choices.items()}

    def alone(self, layer: int, choice: int) -> tuple[int, ...]:
        """Indices at which one layer has a choice and all others are dense."""
        return tuple(choice if i == layer else 0 for i in range(len(self.errors)))

    def least(self, name: str) -> float:
        """The smallest fraction of a cost that any allocation keeps."""
        return (least_cost(self.costs[name]) + self.remainder_cost[name]) / self.dense[name]

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
            name: (
                self.remainder_cost[name]
                + float(sum(c[i] for c, i in zip(table, indices, strict=True)))
            )
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
            if least_cost(self.costs[name]) > limit * (1 + SLACK):
                raise BudgetError(
                    f"no allocation keeps {name} <= {self.budget[name]:g} of the dense model's; "
                    f"the smallest possible is {_round_up(self.least(name)):g}."
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


def _round_up(fraction: float) -> float:
    return float(np.ceil(fraction * 1e4) / 1e4)
