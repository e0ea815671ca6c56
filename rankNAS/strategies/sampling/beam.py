"""Beam search (BSR): joint selection of ranks, from dense down to the budget; a reconstruction.

The search descends levels of equal cost. A child lowers one layer of its parent, to the most
accurate choice that brings the whole network to the next level; the best few of all children, as
measured without any training, are lowered further. A child that meets the budgets leaves the beam.
The levels do not depend on the budgets, so that several budgets share the measurements above them.

Notation: L layers, C_l choices of layer l, K budgeted costs.

References:
    Eo, Kang and Rhee, Neural Networks 2023, arXiv 2111.15179 (BSR). The text was not available to
    us: what is known is the beam search, over the ranks of all layers jointly, with SVDs and
    without training in between. The levels of equal cost, what counts as a step, and the score are
    reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.deadline import check_time
from rankNAS.exceptions import UsageError
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.base import Request, Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["Beam", "Outcome", "beam_search"]

State = tuple[int, ...]
Score = Literal["divergence", "loss", "objective"]
NARROWINGS = 40  # halvings of a level that no single layer can reach


@dataclass(frozen=True)
class Outcome:
    """The state of a beam search.

    Args:
        missing: States whose scores are needed to continue; none at the end.
        finished: States within the last level, likely best first.
    """

    missing: tuple[State, ...]
    finished: tuple[State, ...]


@final
@dataclass(frozen=True)
class Beam(Strategy):
    """Beam search from the dense network down to the budget.

    The trials are the states that meet the budget, at most `width` x layers of them; all states
    above it are probes, about `width` x layers a level. There are about layers / `step` x
    log(1 / budget) levels.

    Args:
        width: States that are lowered further on each level; 1 is greedy.
        step: What a level removes, in units of the mean layer's cost on that level: large steps
            early, small ones near the budget.
        score: ``divergence`` scores the main metric of the task by the divergence from the dense
            network; ``loss`` scores shares of correct predictions by the loss, and so does
            ``divergence`` where there is none. Any other objective, and with ``objective`` these
            too, is its own score.
        children: Measure only so many children of a state, those of the least total relative
            error; None measures all, as published.
        operators: Whose choices are used; None for all.

    Raises:
        UsageError: A number out of range.
    """

    width: int = 2
    step: float = 0.5
    score: Score = "divergence"
    children: int | None = None
    operators: tuple[str, ...] | None = ("svd",)
    name = "beam"

    def __post_init__(self) -> None:
        least = min(self.width, 1 if self.children is None else self.children)
        if least < 1 or not 0 < self.step <= 1:
            raise UsageError(
                "`width` and `children` must be at least 1 and `step` in (0, 1]; "
                f"got {self.width}, {self.children} and {self.step}."
            )
        if self.score not in get_args(Score):
            raise UsageError(f"`score` must be one of {get_args(Score)}, got {self.score!r}.")

    def check(self, request: Request) -> None:
        if not request.budget:
            raise UsageError(
                "the strategy 'beam' lowers ranks until a budget is met, but there is none; give "
                "one, for example macs=0.5."
            )

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """The unmeasured children of the first level that has any."""
        problem = problem.within(self.operators)
        scores = self._scores(problem, history)
        return [problem.allocation(s) for s in self._search(problem, scores).missing]

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """States that met the budget and were not measured yet, likely best first."""
        problem = problem.within(self.operators)
        scores = self._scores(problem, history)

        def known(state: State) -> float:
            # Without probes, by relative error alone.
            score = scores(state)
            return -math.inf if score is None else score

        layers = len(problem.errors)
        finished = self._search(problem, known).finished[: self.width * layers]
        if not finished:  # several costs, and no single layer lowers what is still too much
            return Energy().propose(problem, history, n, rng)
        allocations = [problem.allocation(s) for s in finished]
        return [a for a in allocations if a not in history.proposed][:n]

    def _search(self, problem: Problem, score: Callable[[State], float | None]) -> Outcome:
        costs = [np.stack(layer) for layer in zip(*problem.budgeted(), strict=True)]
        if not costs:
            return Outcome((), (problem.all_dense,))
        limits = np.array(list(problem.limits.values()))
        dense = np.sum([cost[:, DENSE_INDEX] for cost in costs], axis=0)
        compressible = sum(cost.shape[1] > 1 for cost in costs)
        levels = _levels(dense, limits, self.step / max(1, compressible))
        return beam_search(problem.errors, costs, levels, self.width, score, self.children)

    def _scores(self, problem: Problem, history: History) -> Callable[[State], float | None]:
        """A state's score, larger is better: None if not measured, minus infinity if it failed."""
        by_divergence = self.score == "divergence" and problem.ranked_by_divergence
        by_loss = (
            self.score != "objective"
            and problem.objectives[0] in problem.metrics
            and problem.directions[0] == "maximize"
        )

        def score(state: State) -> float | None:
            trial = history.found.get(problem.allocation(state))
            if trial is None:
                return None
            if trial.state == "failed":
                return -math.inf
            if by_divergence and problem.divergence in trial.metrics:
                return -trial.metrics[problem.divergence]
            if by_loss and "loss" in trial.metrics:
                return -trial.metrics["loss"]
            return float(problem.signs[0]) * trial.values[0]

        return score


def _levels(dense: Array, limits: Array, share: float) -> list[Array]:
    """Costs (K,) from just below dense down to the limits, each less by a share of itself.

    A cost that has reached its limit stays there while the others go on.
    """
    levels = []
    reached = dense * (1 - share)
    while (reached > limits).any():
        levels.append(np.maximum(reached, limits))
        reached = reached * (1 - share)
    return [*levels, limits]


def beam_search(
    errors: Sequence[Array],  # per layer (C_l,)
    costs: Sequence[Array],  # per layer (K, C_l)
    levels: Sequence[Array],  # each (K,)
    width: int,
    score: Callable[[State], float | None],
    children: int | None = None,
) -> Outcome:
    """Beam search over one choice per layer, from dense.

    Args:
        errors: Relative error of each choice: which choice a lowered layer gets, and which of two
            states of the same score is better.
        costs: Cost of each choice.
        levels: What all layers together may cost, level by level; a state within the last one is
            finished. A level that no single layer can reach is approached in smaller steps.
        width: States that are kept on a level.
        score: A state's score, larger is better; None if it is not known yet.
        children: Consider only so many children of a state, of the least total error.
    """
    tables = _Tables(errors, costs, children)
    last = levels[-1]
    beam: list[State] = [(DENSE_INDEX,) * len(errors)]
    if tables.meets(beam[0], last):
        return Outcome((), tuple(beam))
    finished: dict[State, tuple[int, int]] = {}
    waiting, done = list(levels), 0
    while waiting and beam:
        check_time()
        families = [tables.children(state, waiting[0]) for state in beam]
        if any(families):
            waiting.pop(0)
        else:
            families = [tables.nearer(state, waiting[0]) for state in beam]
        done += 1
        live: dict[State, float | None] = {}
        for rank, family in enumerate(families):
            for place, child in enumerate(family):
                if not tables.meets(child, last):
                    live[child] = live.get(child, score(child))
                elif child not in finished:
                    # Of one level, best parents and least errors in turn; late levels first.
                    finished[child] = (-done, rank + place)
        if missing := [state for state, value in live.items() if value is None]:
            return Outcome(tuple(sorted(missing)), ())
        known = {state: value for state, value in live.items() if value is not None}
        beam = sorted(known, key=lambda s: (-known[s], tables.error(s), s))[:width]
    order = sorted(finished, key=lambda s: (finished[s], tables.error(s), s))
    return Outcome((), tuple(order))


@dataclass(frozen=True)
class _Tables:
    """Errors and costs of all choices; what one step can do."""

    errors: Sequence[Array]
    costs: Sequence[Array]
    most: int | None

    def error(self, state: State) -> float:
        return sum(float(e[i]) for e, i in zip(self.errors, state, strict=True))

    def cost(self, state: State) -> Array:  # -> (K,)
        total: Array = np.sum([c[:, i] for c, i in zip(self.costs, state, strict=True)], axis=0)
        return total

    def meets(self, state: State, level: Array) -> bool:
        return bool((self.cost(state) <= level * (1 + SLACK)).all())

    def children(self, state: State, level: Array) -> list[State]:
        """Per layer, the most accurate choice that reaches the level; by total error.

        A state that is there already stays as it is.
        """
        total = self.cost(state)
        room = level * (1 + SLACK) - total
        if (room >= 0).all():
            return [state]
        found = []
        for layer, i in enumerate(state):
            cost, errors = self.costs[layer], self.errors[layer]
            allowed = np.all(cost - cost[:, i : i + 1] <= room[:, np.newaxis], axis=0)
            if allowed.any():
                j = int(np.argmin(np.where(allowed, errors, np.inf)))
                found.append((errors[j] - errors[i], (*state[:layer], j, *state[layer + 1 :])))
        return [child for _, child in sorted(found)[: self.most]]

    def nearer(self, state: State, level: Array) -> list[State]:
        """Children on the way to a level that no single layer can reach, as far as one can."""
        total = self.cost(state)
        for _ in range(NARROWINGS):
            level = (level + np.maximum(total, level)) / 2
            if self.meets(state, level):
                break
            if family := self.children(state, level):
                return family
        return []
