"""The trials of a study: what strategies and pruners know of earlier evaluations."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.renamed import renamed
from rankNAS.strategies.problem import Array, Problem

__all__ = [
    "History",
    "Trial",
    "by_divergence",
    "degradation",
    "objective_values",
    "rankings",
]


@renamed(target="budget_key")
@dataclass(frozen=True)
class Trial:
    """One evaluated allocation.

    Args:
        number: Position in the study, from 0.
        allocation: The evaluated allocation.
        state: ``complete``, ``failed``, or ``pruned`` if it was stopped early.
        values: The objectives, in the order of the problem; empty unless complete.
        metrics: Everything that was measured, by name.
        seconds: How long the evaluation took.
        reason: Why it failed or was stopped.
        probe: Whether it is a probe, which need not meet the budget.
        budget_key: The label of the budget that it was proposed for.
        weights: The file of the weights that the strategy has trained for it; empty if none.

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
    weights: str = ""


@dataclass(frozen=True)
class History:
    """All trials of a study so far, and the allocations that are being evaluated now."""

    trials: tuple[Trial, ...] = ()
    pending: tuple[Allocation, ...] = ()

    def extended(self, *trials: Trial) -> History:
        """The history with further trials; cached views are carried over."""
        return self._with(History((*self.trials, *trials), self.pending), trials)

    def awaiting(self, pending: Sequence[Allocation]) -> History:
        """The history with other pending allocations."""
        return self._with(History(self.trials, tuple(pending)), ())

    def _with(self, later: History, trials: Sequence[Trial]) -> History:
        """Carry cached views to the extended history (amortised O(1) per trial)."""
        later.__dict__["_filtered"] = self._filtered
        later.__dict__["_best"] = self._best
        if "_trials" in self.__dict__:
            added = {t.allocation: t for t in trials if not t.probe}
            later.__dict__["_trials"] = self._trials | added if added else self._trials
        if "complete" in self.__dict__:
            found = tuple(t for t in trials if t.state == "complete")
            later.__dict__["complete"] = self.complete + found
        if "found" in self.__dict__:
            later.__dict__["found"] = _by_allocation(self.found, trials)
        return later

    @cached_property
    def _filtered(self) -> dict[int | str, tuple[Problem, int, tuple[Trial, ...]]]:
        return {}

    @cached_property
    def _best(self) -> dict[int, tuple[Problem, int, Trial | None, bool]]:
        return {}

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """The trials that succeeded, probes and those proposed for other budgets included."""
        return tuple(t for t in self.trials if t.state == "complete")

    @cached_property
    def found(self) -> dict[Allocation, Trial]:
        """The trials, failed ones too, by their allocation; a trial comes before a probe."""
        return _by_allocation({}, self.trials)

    def has(self, allocation: Allocation, *, probe: bool) -> bool:
        """Whether an evaluation is done. A probe may still be evaluated as a trial."""
        known = self.found.get(allocation)
        return known is not None and (probe or not known.probe)

    def feasible(self, problem: Problem) -> tuple[Trial, ...]:
        """The successful trials that meet a problem's budgets, whatever they were made for."""

        def wanted(trial: Trial) -> bool:
            done = trial.state == "complete"
            return done and problem.meets(problem.indices(trial.allocation))

        return self._filter(id(problem), problem, wanted)

    def best(self, problem: Problem) -> Trial | None:
        """The best feasible trial: by its first rank, then the loss, then the number.

        Only trials since the last call for the problem are looked at.
        """
        trials = self.feasible(problem)
        _, seen, best, paired = self._best.get(id(problem), (problem, 0, None, True))
        if seen > len(trials):  # of a later history
            seen, best, paired = 0, None, True
        if paired and not by_divergence(problem, trials[seen:]):
            seen, best, paired = 0, None, False  # all are ranked otherwise from now on
        new = (*((best,) if best else ()), *trials[seen:])
        ranks = (rankings if paired else objective_values)(problem, new)[:, 0].tolist()
        keys = [
            (rank, -t.metrics.get("loss", 0.0), -t.number)
            for rank, t in zip(ranks, new, strict=True)
        ]
        found = new[max(range(len(new)), key=keys.__getitem__)] if new else None
        # The problem is kept too: as long as it lives, no other one has its id.
        self._best[id(problem)] = (problem, len(trials), found, paired)
        return found

    def candidates(self, problem: Problem) -> tuple[Trial, ...]:
        """The trials, failed ones too, that were proposed for a problem's budgets."""
        budget_key = problem.budget_key
        return self._filter(
            budget_key, problem, lambda t: not t.probe and t.budget_key == budget_key
        )

    def _filter(
        self, key: int | str, problem: Problem, wanted: Callable[[Trial], bool]
    ) -> tuple[Trial, ...]:
        """The wanted trials; earlier results are cached."""
        _, seen, known = self._filtered.get(key, (problem, 0, ()))
        if seen > len(self.trials):  # of a later history
            seen, known = 0, ()
        found = known + tuple(t for t in self.trials[seen:] if wanted(t))
        # The problem is kept too: as long as it lives, no other one has its id.
        self._filtered[key] = (problem, len(self.trials), found)
        return found

    @cached_property
    def proposed(self) -> Set[Allocation]:
        """Every allocation that was evaluated, as a trial or a probe, or is being evaluated."""
        waiting: dict[Allocation, Any] = dict.fromkeys(self.pending)
        return ChainMap(waiting, self.found).keys()

    @cached_property
    def tried(self) -> Set[Allocation]:
        """Every allocation that was evaluated as a trial, or is being evaluated."""
        waiting: dict[Allocation, Any] = dict.fromkeys(self.pending)
        return ChainMap(waiting, self._trials).keys()

    @cached_property
    def _trials(self) -> dict[Allocation, Trial]:
        return {t.allocation: t for t in self.trials if not t.probe}


def degradation(problem: Problem, trial: Trial) -> float:
    """How much worse a trial is than the dense model; smaller is better.

    The divergence from the dense model's predictions, if the first objective is a metric of the
    task: it needs no labels, is smooth where shares of correct predictions jump, and cannot be
    improved by fitting the validation labels. Otherwise the first objective itself.
    """
    if problem.objectives[0] in problem.metrics and problem.divergence in trial.metrics:
        return trial.metrics[problem.divergence]
    return -float(problem.signs[0]) * trial.values[0]


def rankings(problem: Problem, trials: Sequence[Trial]) -> Array:
    """What trials are ranked by, (trials, objectives); larger is better.

    Where the first objective is the main metric of the task, minus the divergence from the dense
    model takes its place, if all trials have it: between two networks it is a paired difference
    over the samples, whose error is far smaller than that of a share of correct predictions. Any
    other objective is its own rank, up to its sign.
    """
    ranks = objective_values(problem, trials)
    if by_divergence(problem, trials):
        ranks[:, 0] = [-t.metrics[problem.divergence] for t in trials]
    return ranks


def by_divergence(problem: Problem, trials: Sequence[Trial]) -> bool:
    """Whether the divergence takes the place of the first objective in the ranks of trials."""
    return problem.ranked_by_divergence and all(problem.divergence in t.metrics for t in trials)


def objective_values(problem: Problem, trials: Sequence[Trial]) -> Array:
    """The objectives of trials, (trials, objectives), with signs so that larger is better."""
    values: Array = np.array([t.values for t in trials], dtype=float)
    return values.reshape(len(trials), len(problem.objectives)) * problem.signs


def _by_allocation(
    known: dict[Allocation, Trial], trials: Sequence[Trial]
) -> dict[Allocation, Trial]:
    """The known trials and further ones; a trial comes before a probe."""
    found = dict(known) if trials else known
    for trial in trials:
        earlier = found.get(trial.allocation)
        if earlier is None or not trial.probe or earlier.probe:
            found[trial.allocation] = trial
    return found
