"""A search in numbers: tables over layers and choices, budgets and objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.budget import budget_key
from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.objectives.base import Direction
from rankNAS.renamed import renamed
from rankNAS.solver.min_max import min_max
from rankNAS.solver.pareto import pareto_filter
from rankNAS.solver.tables import SLACK, least_cost
from rankNAS.tasks import METRICS

__all__ = ["DENSE_INDEX", "Array", "Problem"]

Array = npt.NDArray[np.float64]
DENSE_INDEX = 0  # of every layer's choices and tables


@renamed(label="budget_key", rest="remainder_cost")
@dataclass(frozen=True)
class Problem:
    """A search in numbers: tables over layers and choices, budgets and directions.

    Args:
        choices: Choices of each layer by name, in the order of all tables: dense, once, at
            `DENSE_INDEX`.
        errors: Relative error of each choice, one array a layer; 0 for dense.
        costs: By cost name, one array a layer.
        remainder_cost: By cost name, the cost of everything outside the layers.
        budget: By cost name, the fraction kept of the dense model's cost.
        objectives: Names of the objectives.
        directions: Their directions.
        metrics: The metrics of the task, which are computed from predictions alone; the main one
            first.
        divergence: The metric that compares a network's predictions with the dense model's.
        losses: Absolute second-order loss of each choice alone, one array a layer, in units that
            are comparable over layers; 0 for dense. Empty if unknown: `errors` stand for it.
        streamed: Whether the factors lie in files, so that a refit is a walk through the network.

    Raises:
        UsageError: The first choice of a layer is not dense, dense occurs again or has an error,
            or a table does not fit the choices.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    errors: tuple[Array, ...]
    costs: Mapping[str, tuple[Array, ...]]
    remainder_cost: Mapping[str, float]
    budget: Mapping[str, float]
    objectives: tuple[str, ...] = ("loss",)
    directions: tuple[Direction, ...] = ("minimize",)
    metrics: tuple[str, ...] = tuple(METRICS)
    divergence: str = "kl_divergence"
    losses: tuple[Array, ...] = ()
    streamed: bool = False

    def __post_init__(self) -> None:
        tables = [("errors", self.errors), *self.costs.items()]
        tables += [("losses", self.losses)] if self.losses else []
        for what, table in tables:
            if [len(row) for row in table] != [len(c) for c in self.choices.values()]:
                raise UsageError(f"the table of {what} does not fit the choices of the layers.")
        for (name, choices), errors in zip(self.choices.items(), self.errors, strict=True):
            operators = [choice.operator for choice in choices]
            if not operators or operators[DENSE_INDEX] != DENSE.operator:
                raise UsageError(f"the first choice of layer {name!r} must be dense.")
            if operators.count(DENSE.operator) > 1:
                raise UsageError(f"layer {name!r} has the choice dense more than once.")
            if errors[DENSE_INDEX] != 0:
                raise UsageError(
                    f"the error of layer {name!r} left dense must be 0, got {errors[DENSE_INDEX]}."
                )

    @property
    def budget_key(self) -> str:
        """The budgets as text: ``macs<=0.5``, or ``dense`` without any."""
        return budget_key(self.budget)

    @property
    def absolute(self) -> tuple[Array, ...]:
        """The losses; the errors if they are unknown."""
        return self.losses or self.errors

    @property
    def ranked_by_divergence(self) -> bool:
        """Whether trials are ranked by the divergence: the first objective is the main metric."""
        return self.objectives[0] == self.metrics[0]

    @cached_property
    def signs(self) -> Array:
        """By objective, the sign that makes larger values better."""
        return np.array([1.0 if d == "maximize" else -1.0 for d in self.directions])

    @cached_property
    def dense(self) -> dict[str, float]:
        """By cost name, the cost of the dense model."""
        return {
            name: self.remainder_cost[name] + float(sum(c[DENSE_INDEX] for c in table))
            for name, table in self.costs.items()
        }

    @cached_property
    def limits(self) -> dict[str, float]:
        """By budgeted cost, the limit on the sum over the layers."""
        return {
            # The whole cost is exact, whatever is outside the layers.
            name: fraction * self.dense[name] - self.remainder_cost[name]
            if fraction < 1
            else float(sum(c[DENSE_INDEX] for c in self.costs[name]))
            for name, fraction in self.budget.items()
        }

    def within(self, operators: Sequence[str] | None) -> Problem:
        """The problem with only the non-dominated choices of some operators.

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
                if j == DENSE_INDEX or operators is None or c.operator in operators
            ]
            columns = [self.costs[n][i][allowed] for n in names]
            found = pareto_filter(self.errors[i][allowed], columns, len(allowed))
            kept.append(sorted({DENSE_INDEX, *(allowed[j] for j in found)}))
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
            losses=tuple(e[list(keep)] for e, keep in zip(self.losses, kept, strict=False)),
            costs={
                name: tuple(c[list(keep)] for c, keep in zip(table, kept, strict=True))
                for name, table in self.costs.items()
            },
        )

    def labels(self) -> dict[str, list[str]]:
        """The choices of each layer as text."""
        return {name: [str(c) for c in choices] for name, choices in self.choices.items()}

    @property
    def all_dense(self) -> tuple[int, ...]:
        """Indices at which every layer is dense."""
        return (DENSE_INDEX,) * len(self.errors)

    def alone(self, layer: int, choice: int) -> tuple[int, ...]:
        """Indices at which one layer has a choice and all others are dense."""
        return tuple(choice if i == layer else DENSE_INDEX for i in range(len(self.errors)))

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


def _round_up(fraction: float) -> float:
    return float(np.ceil(fraction * 1e4) / 1e4)
