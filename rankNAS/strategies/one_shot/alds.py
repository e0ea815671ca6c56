"""ALDS: min-max allocation of the relative spectral error over the layers.

Notation, per layer of weight W (f x n, input channels in k groups of columns W_1 .. W_k):

    sigma_j(A)   j-th singular value of A
    e_k[j]       max_i sigma_{j+1}(W_i) / sigma_1(W), the error of rank j in every group
    bound        sqrt(k) e_k[j], which is at least ||W - What||_2 / ||W||_2 (Theorem 1)

The published algorithm alternates between one threshold for all layers (global step) and the
number of groups of each layer (local step), from several starts. On tables the same problem,
equation 4, can be solved exactly: `Alds` does, and `iterate` runs the published
alternation for comparison.

References:
    Liebenwein, Maalouf, Feldman and Rus, NeurIPS 2021: the bound, the problem, the algorithm.
    Their code, torchprune: the error without sqrt(k), seeds and number of iterations.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rankNAS import decompositions
from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.deadline import check_time
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer
from rankNAS.solver.min_max import min_max
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem
from rankNAS.strategies.spectra import LayerSpectra, channel_groups, spectral_errors

__all__ = ["Alds", "Certificate", "Iteration", "bound", "iterate"]

logger = logging.getLogger(__name__)
Indices = npt.NDArray[np.int64]
OPERATORS = ("svd", "group_svd")
RANKS = 64  # of a number of groups, at most
FIXED = (1, 3, 5, 7, 9)  # groups of the first starts; torchprune's, and 1: plain SVD everywhere


@dataclass(frozen=True)
class Certificate:
    """How good the solution is.

    Args:
        exact: The least possible worst error, which the solution attains.
        iterated: The worst error that the published alternation finds; infinite if no start of it
            meets the budgets.
    """

    exact: float
    iterated: float

    @property
    def gap(self) -> float:
        """By how much the alternation is worse; never negative."""
        return self.iterated - self.exact


@final
@dataclass(frozen=True)
class Alds(OneShot):
    """The ranks and numbers of channel groups of the least worst spectral error, exactly.

    The errors are those of the weight, without data, whatever the norm of the factors, which is
    ``weight`` too unless the settings name another one. Every number of groups and
    up to 64 ranks of each are candidates (sections 3.1 and 3.2); those stay that no other beats in
    the bound and in cost. Before `bind`, the square root of the problem's relative error stands in
    for the spectral error.

    Args:
        sqrt_k: Use the bound of Theorem 1; False leaves out sqrt(k), as torchprune does, which
            underestimates the error of many groups.
        operators: ``svd`` (one group), ``group_svd``, or both.
        spectral: By layer and choice, the error; set by `bind`.

    Raises:
        UsageError: An operator whose error the theorem does not bound.
    """

    sqrt_k: bool = True
    operators: tuple[str, ...] | None = OPERATORS
    spectral: Mapping[str, Mapping[Choice, float]] = field(
        default_factory=dict, repr=False, hash=False
    )
    name = "alds"
    norm = "weight"
    needs_spectra = ("weight",)

    def __post_init__(self) -> None:
        if self.operators is None or not set(self.operators) <= set(OPERATORS):
            raise UsageError(
                f"`operators` of 'alds' must be among {', '.join(OPERATORS)}, whose error its "
                f"theorem bounds, got {self.operators}; 'energy' takes them all."
            )

    def using(self, operators: Sequence[str]) -> Strategy:
        """The strategy with those of a user's operators that the theorem bounds, if any."""
        bounded = tuple(name for name in operators if name in OPERATORS)
        return replace(self, operators=bounded) if bounded else self

    def candidates(self, layer: Layer, weight: Tensor) -> Mapping[Choice, float]:
        """The ranks of every number of groups, at most `RANKS` of each, with their bounds."""
        offered = {choice.operator for choice in layer.choices}
        found: dict[Choice, float] = {}
        for name in self.operators or ():
            if name in offered:
                for family in decompositions.OPERATORS[name].families(layer.shape):
                    step = -(-len(family) // RANKS)
                    choices = [Choice(name, rank) for rank in family[step - 1 :: step]]
                    k = channel_groups(choices[0]) or 1
                    errors = bound(spectral_errors(weight, k), k, sqrt_k=self.sqrt_k)
                    found |= {choice: float(errors[choice.rank[-1]]) for choice in choices}
        return found

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        """The strategy with the spectral error of every choice of every layer."""
        tables = {name: _spectral_table(found, self.sqrt_k) for name, found in spectra.items()}
        return replace(self, spectral=tables)

    def solve(self, problem: Problem) -> Allocation:
        """The exact min-max allocation; of several, the one of the least total error."""
        if logger.isEnabledFor(logging.INFO):
            found = self.certificate(problem)
            logger.info(
                "%s: worst error %.6g; the alternation of ALDS reaches %.6g, which is %.3g more",
                problem.budget_key,
                found.exact,
                found.iterated,
                found.gap,
            )
        return Energy().solve(self._table(problem).within(self.operators))

    def certificate(self, problem: Problem) -> Certificate:
        """The exact optimum beside what the published alternation finds.

        Raises:
            BudgetError: No allocation meets the budgets.
        """
        table = self._table(problem)
        within = table.within(self.operators)
        exact = min_max(within.errors, within.budgeted(), list(within.limits.values())).value
        return Certificate(exact, iterate(table, operators=self.operators).epsilon)

    def _table(self, problem: Problem) -> Problem:
        """The problem with spectral errors; those of other operators' choices are infinite."""
        if not self.spectral:
            return replace(problem, errors=tuple(np.sqrt(e) for e in problem.errors))
        errors = tuple(
            np.array([self.spectral[name].get(c, np.inf) for c in choices])
            for name, choices in problem.choices.items()
        )
        return replace(problem, errors=errors)


# ---------------------------------------------------------------------------------- the errors


def bound(errors: Array, groups: int, *, sqrt_k: bool) -> Array:
    """The bound of Theorem 1 from the errors e_k; torchprune's without `sqrt_k`."""
    return errors * np.sqrt(groups) if sqrt_k else errors


def _spectral_table(found: LayerSpectra, sqrt_k: bool) -> dict[Choice, float]:
    tables = {k: bound(np.array(e), k, sqrt_k=sqrt_k) for k, e in found.weight.items()}
    groups = {c: k for c in found.layer.choices if (k := channel_groups(c)) is not None}
    return {DENSE: 0.0, **{c: float(tables[k][c.rank[-1]]) for c, k in groups.items()}}


# ----------------------------------------------------------------------------- the alternation


@dataclass(frozen=True)
class Iteration:
    """What the published alternation finds.

    Args:
        indices: The choice of each layer, of the best start; empty if no start meets the budgets.
        epsilon: Its worst error; infinite if there is none.
        traces: The worst error after each global step, of each start.
    """

    indices: tuple[int, ...]
    epsilon: float
    traces: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Options:
    """A layer's choices by number of groups.

    Args:
        errors: (C,).
        costs: (K, C), relative to the limits.
        families: By number of groups k, the positions of its choices and of dense, cheapest first.
    """

    errors: Array
    costs: Array
    families: Mapping[int, Indices]

    def nearest(self, groups: int) -> int:
        """The offered number of groups nearest to one; of two, the larger."""
        return min(self.families, key=lambda k: (abs(k - groups), -k))

    def cheapest(self, groups: int, epsilon: float) -> int:
        """The cheapest choice of k groups whose error is at most epsilon; dense always is."""
        family = self.families[groups]
        return int(family[np.argmax(self.errors[family] <= epsilon)])

    def local_step(self, groups: int, choice: int) -> int:
        """The number of groups of the least error at a choice's cost; ties keep the present."""
        affordable = np.atleast_1d(np.all(self.costs <= self.costs[:, [choice]], axis=0))
        least = self.errors[choice]
        for k, family in self.families.items():
            error = self.errors[family[affordable[family]]].min(initial=np.inf)
            if error < least:
                groups, least = k, error
        return groups


def iterate(
    problem: Problem,
    *,
    operators: Sequence[str] | None = OPERATORS,
    n_seeds: int = 15,
    iterations: int = 4,
    seed: int = 0,
) -> Iteration:
    """The alternation of ALDS, from several starts.

    The starts are k = 1, 3, 5, 7 and 9 groups in every layer, or the nearest number that a layer
    offers, and then random ones; where a start cannot meet the budgets, its numbers of groups are
    halved until it can. Two details differ from torchprune: the threshold is found by bisection
    over the errors that occur, which is exact, in place of Brent's method; and the local step
    rounds ranks down, so that no budget needs to be repaired.

    Args:
        problem: Tables whose errors are the bounds to be levelled.
        operators: Whose choices are used.
        n_seeds: Starts.
        iterations: Global steps of each start, at most.
        seed: Of the random starts.
    """
    rng = np.random.default_rng(seed)
    layers = _options(problem, operators)
    starts = [[x.nearest(k) for x in layers] for k in FIXED[:n_seeds]]
    for _ in range(n_seeds - len(starts)):
        starts.append([int(rng.choice(list(x.families))) for x in layers])
    solutions: list[tuple[tuple[int, ...], float]] = [((), float("inf"))]
    traces = []
    for start in starts:
        found = [(tuple(j), _worst(layers, j)) for j in _alternate(layers, start, iterations)]
        traces.append(tuple(epsilon for _, epsilon in found))
        solutions += found
    best, epsilon = min(solutions, key=lambda solution: solution[1])
    return Iteration(best, epsilon, tuple(traces))


def _options(problem: Problem, operators: Sequence[str] | None) -> list[_Options]:
    limits = np.array(list(problem.limits.values()))
    layers = []
    for i, choices in enumerate(problem.choices.values()):
        costs = np.array([table[i] for table in problem.budgeted()]).reshape(-1, len(choices))
        members: dict[int, list[int]] = {}
        for j, choice in enumerate(choices):
            if choice != DENSE and (operators is None or choice.operator in operators):
                members.setdefault(channel_groups(choice) or 1, []).append(j)
        costs = costs / limits[:, None]
        total = costs.sum(0)
        families = {
            k: np.array(sorted([*found, DENSE_INDEX], key=lambda j: total[j]))
            for k, found in (members or {1: []}).items()
        }
        layers.append(_Options(problem.errors[i], costs, families))
    return layers


def _alternate(
    layers: Sequence[_Options], groups: list[int], iterations: int
) -> Iterator[list[int]]:
    """The allocation after each global step of one start."""
    for _ in range(iterations):
        check_time()
        while (indices := _global_step(layers, groups)) is None:
            halved = [x.nearest(k // 2) for x, k in zip(layers, groups, strict=True)]
            if halved == groups:
                return
            groups = halved
        yield indices
        before = groups
        rows = zip(layers, groups, indices, strict=True)
        groups = [x.local_step(k, j) for x, k, j in rows]
        if groups == before:
            return


def _global_step(layers: Sequence[_Options], groups: Sequence[int]) -> list[int] | None:
    """The least common threshold that the budgets allow, with the numbers of groups as given."""

    def chosen(epsilon: float) -> list[int]:
        return [x.cheapest(k, epsilon) for x, k in zip(layers, groups, strict=True)]

    def fits(epsilon: float) -> bool:
        used = sum(x.costs[:, j] for x, j in zip(layers, chosen(epsilon), strict=True))
        return bool(np.all(used <= 1 + SLACK))

    pairs = zip(layers, groups, strict=True)
    thresholds = np.unique(np.concatenate([x.errors[x.families[k]] for x, k in pairs]))
    position = bisect_left(thresholds, True, key=fits)
    return chosen(float(thresholds[position])) if position < len(thresholds) else None


def _worst(layers: Sequence[_Options], indices: Sequence[int]) -> float:
    return max(float(x.errors[j]) for x, j in zip(layers, indices, strict=True))
