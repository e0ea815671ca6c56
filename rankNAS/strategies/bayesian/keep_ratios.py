"""Keep-ratios shared by layers of one kind: the search variables of Bolaco.

A layer's kind is its path without the numbers that count repetitions, so that one kind runs
through all blocks of a network. Queries and keys are one kind; values are never compressed.

Notation: L layers, V variables, P points, K budgeted costs.

References:
    Ji et al., EMNLP Findings 2024 (Bolaco), sections 3.2 and 4.1.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import Allocation
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem
from rankNAS.strategies.sampling.shares import within_shares

__all__ = ["KeepRatios", "kind"]

Indices = npt.NDArray[np.int64]
QUERIES_AND_KEYS = {"q_proj", "k_proj", "query", "key", "to_q", "to_k", "wq", "wk", "q", "k"}
VALUES = {"v_proj", "value", "to_v", "wv", "v"}
OUTPUTS = {"o_proj", "out_proj", "to_out", "wo", "o"}
ATTENTION = {"queries_and_keys", *OUTPUTS}
LOWEST = 0.2  # keep-ratios begin here, or at half of a smaller budget
BAND = 0.1  # allocations that keep less than the budget minus this are not tried
ATTEMPTS = 20  # rounds of sampling before fewer allocations than asked for are returned
ROUND = 512  # samples of a round


def kind(name: str) -> str:
    """The kind of a layer: its path without repetition numbers.

    >>> kind("model.layers.3.mlp.up_proj"), kind("model.layers.3.self_attn.k_proj")
    ('model.layers.mlp.up_proj', 'model.layers.self_attn.queries_and_keys')
    >>> kind("layer2.0.conv1"), kind("layer2.0.downsample.0"), kind("features.12")
    ('layer.conv1', 'layer.downsample', 'features')
    """
    parent, _, last = _place(name).rpartition(".")
    last = "queries_and_keys" if last in QUERIES_AND_KEYS else last
    return f"{parent}.{last}" if parent else last


def _place(name: str) -> str:
    *parents, last = [part for part in name.split(".") if not part.isdigit()] or ["layers"]
    return ".".join([*(re.sub(r"\d+$", "", parent) for parent in parents), last])


@dataclass(frozen=True)
class KeepRatios:
    """The variables of a problem, and what their values stand for.

    Args:
        problem: Tables and budgets; values stay dense.
        variables: By kind and stage, the positions of its layers.
    """

    problem: Problem
    variables: dict[tuple[str, int], list[int]]

    @classmethod
    def of(cls, problem: Problem, stages: int) -> KeepRatios:
        """One variable for each kind of layer in each of some equal parts of the depth.

        Raises:
            BudgetError: The budgets cannot be met without compressing values.
        """
        names = list(problem.choices)
        fixed = {i for i, name in enumerate(names) if name.split(".")[-1] in VALUES}
        problem = problem.restricted(
            [[DENSE_INDEX] if i in fixed else range(len(e)) for i, e in enumerate(problem.errors)]
        )
        problem.check()
        # Queries and keys are counted apart, so that those of one block are in one stage.
        places = [_place(name) for name in names]
        count, seen = Counter(places), Counter[str]()
        variables: dict[tuple[str, int], list[int]] = {}
        for i, (name, place) in enumerate(zip(names, places, strict=True)):
            stage = seen[place] * stages // count[place]
            seen[place] += 1
            if len(problem.errors[i]) > 1:
                variables.setdefault((kind(name), stage), []).append(i)
        return cls(problem, variables)

    @cached_property
    def attention(self) -> npt.NDArray[np.bool_]:
        """Which variables are of attention layers, (V,)."""
        return np.array([name.split(".")[-1] in ATTENTION for name, _ in self.variables])

    @cached_property
    def lowest(self) -> float:
        """The least ratio that is tried."""
        return min(LOWEST, float(self._kept_at_most.min(initial=1)) / 2)

    @cached_property
    def _dense_cost(self) -> Array:  # (K,)
        return np.array(
            [sum(float(c[DENSE_INDEX]) for c in table) for table in self.problem.budgeted()]
        )

    @cached_property
    def _kept_at_most(self) -> Array:  # (K,)
        return np.array(list(self.problem.limits.values())) / self._dense_cost

    @cached_property
    def _relative(self) -> list[Array]:
        """Per layer, the largest budgeted cost of each choice relative to dense, (C_l,)."""
        tables = self.problem.budgeted()
        return [
            np.max([table[i] / table[i][DENSE_INDEX] for table in tables] or [0 * errors], axis=0)
            for i, errors in enumerate(self.problem.errors)
        ]

    def default(self) -> Allocation:
        """Where the search starts: attention keeps 0.5 for every 0.8 of the others, on the budget.

        These are the published proportions, at a budget of 0.8.
        """
        shares = np.ones(len(self.problem.errors))
        for layers, attention in zip(self.variables.values(), self.attention, strict=True):
            shares[layers] = 0.5 / 0.8 if attention else 1.0
        return self.problem.allocation(within_shares(self.problem, shares).tolist())

    def decode(self, ratios: Array) -> Indices:  # (P, V) -> (P, L)
        """Per layer the most accurate choice that costs at most its ratio of dense; 1 is dense.

        Where there is none, the cheapest.
        """
        indices = np.full((len(ratios), len(self.problem.errors)), DENSE_INDEX)
        for column, layers in zip(ratios.T, self.variables.values(), strict=True):
            for i in layers:
                relative = self._relative[i]
                within = relative <= column[:, np.newaxis] * (1 + SLACK)  # (P, C_l)
                best = np.where(within, self.problem.errors[i], np.inf).argmin(1)
                indices[:, i] = np.where(within.any(1), best, relative.argmin())
        return indices

    def kept(self, problem: Problem, indices: Indices) -> Array:  # -> (P, V)
        """The fraction of its cost that each variable's layers keep, averaged over the budgets.

        Args:
            problem: Tables of the allocations, of the same layers.
            indices: Any allocations (P, L), whether or not they share ratios.
        """
        tables = problem.budgeted() or [next(iter(problem.costs.values()))]
        fractions = np.zeros((len(indices), len(self.variables)))
        for v, layers in enumerate(self.variables.values()):
            for table in tables:
                cost = sum(table[i][indices[:, i]] for i in layers)
                fractions[:, v] += cost / sum(table[i][DENSE_INDEX] for i in layers) / len(tables)
        return fractions

    def feasible(self, indices: Indices, band: float = BAND) -> npt.NDArray[np.bool_]:
        """Which allocations (P, L) meet every budget and nearly use up one of them, (P,).

        Args:
            indices: The allocations.
            band: By how much what the layers keep may stay below the budget.
        """
        used = np.zeros((len(indices), len(self._dense_cost)))
        for k, table in enumerate(self.problem.budgeted()):
            for i, cost in enumerate(table):
                used[:, k] += cost[indices[:, i]] / self._dense_cost[k]
        meets = np.all(used <= self._kept_at_most * (1 + SLACK), axis=1)
        near = (used - self._kept_at_most).max(1, initial=-np.inf) >= -band
        accepted: npt.NDArray[np.bool_] = meets & (near | (used.shape[1] == 0))
        return accepted

    def draw(self, rng: np.random.Generator, count: int) -> Indices:
        """Random feasible allocations, at most so many, (P, L).

        The published sampler draws ratios uniformly and rejects what is infeasible. Here the draws
        are bent by a random power, because uniform ones hardly ever meet a small budget.
        """

        def sample() -> Array:
            uniform = rng.random((ROUND, len(self.variables)))
            power = np.exp(rng.uniform(np.log(1 / 4), np.log(8), (ROUND, 1)))
            bent: Array = self.lowest + (1 - self.lowest) * uniform**power
            return bent

        drawn: list[Indices] = []
        for _ in range(ATTEMPTS):
            drawn.append(self._accepted(sample(), BAND))
            if sum(map(len, drawn)) >= count:
                break
        found = np.concatenate(drawn)[:count]
        # The choices may be so coarse that nothing is near the budget.
        return found if len(found) else self._accepted(sample(), np.inf)[:count]

    def around(self, rng: np.random.Generator, centre: Array, count: int) -> Indices:
        """Feasible allocations whose ratios differ a little, some only in a few variables, (P, L).

        Args:
            rng: Where randomness comes from.
            centre: Ratios (V,).
            count: How many are drawn, before those that are infeasible are rejected.
        """
        size = (count, len(centre))
        scale = rng.choice([0.02, 0.05, 0.1, 0.2], (count, 1))
        changed = rng.random(size) < rng.choice([0.2, 0.5, 1.0], (count, 1))
        moved = centre + rng.normal(0, 1, size) * scale * changed
        return self._accepted(np.clip(moved, self.lowest, 1), BAND)

    def _accepted(self, ratios: Array, band: float) -> Indices:
        indices = self.decode(ratios)
        return indices[self.feasible(indices, band)]
