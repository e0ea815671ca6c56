"""Scheduler: claims proposals, submits them to an executor, and records the outcomes.

The loop is the same for one process and for many. Strategies see pending trials, those of other
processes on the same study included.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rankNAS.allocation import Allocation
from rankNAS.deadline import check_time
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.pruning import PrunedError
from rankNAS.exceptions import ObjectiveError, RankNASError, shortened
from rankNAS.storage.store import Claim
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem

if TYPE_CHECKING:
    from rankNAS.study import Study

__all__ = ["Executor", "Outcome", "Pruner", "Serial", "Evaluation", "execute", "schedule"]

logger = logging.getLogger(__name__)
FAILURES = 3  # consecutive failed trials that stop the search
ATTEMPTS = 5  # proposals already claimed by other processes, before waiting
POLL = 0.5  # seconds between reads of other processes' trials
PATIENCE = 0.2  # seconds between searches for the best trial, whose time grows with the trials
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")

#: Pruner: (budget key, step, metrics) -> continue? A step is the number of validation samples
#: seen, or of epochs trained.
Pruner = Callable[[str, int, Mapping[str, float]], bool]
OnTrial = Callable[[Trial, Trial | None], None]


@dataclass(frozen=True)
class Evaluation:
    """A claimed evaluation.

    Args:
        claim: What to evaluate, and for which budget.
        final: As for `Evaluator.evaluate`.
        screening: As for `Evaluator.evaluate`.
    """

    claim: Claim
    final: bool = False
    screening: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of an evaluation.

    Args:
        evaluation: The evaluation.
        state: ``complete``, ``failed`` or ``pruned``.
        metrics: The measured metrics; those of steps before the last are named ``NAME@STEP``.
        seconds: The evaluation time in seconds.
        cpu_seconds: The CPU seconds of the process that evaluated it.
        reason: The reason of a failure or early stop.
    """

    evaluation: Evaluation
    state: Literal["complete", "failed", "pruned"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    cpu_seconds: float = 0.0


class Executor(ABC):
    """Base class of executors, which run one or several evaluations at a time.

    Attributes:
        slots: Number of evaluations that it accepts before a call of `wait`.
        elsewhere: Whether other processes evaluate, whose CPU seconds are not this one's.
    """

    slots: int
    elsewhere: bool = False

    @abstractmethod
    def submit(self, evaluation: Evaluation) -> None:
        """Start an evaluation."""

    @abstractmethod
    def wait(self) -> Sequence[Outcome]:
        """Outcomes of ended evaluations; waits for at least one, or for a short time."""

    def close(self) -> None:  # noqa: B027
        """Release the executor's resources; unfinished evaluations are discarded."""


class Serial(Executor):
    """Executor that evaluates in this process, one allocation after another.

    Args:
        evaluator: The evaluator.
        pruner: Decides which evaluations to stop early.
    """

    slots = 1

    def __init__(self, evaluator: Evaluator, pruner: Pruner | None = None) -> None:
        self.evaluator, self.pruner = evaluator, pruner
        self._waiting: list[Evaluation] = []

    def submit(self, evaluation: Evaluation) -> None:
        self._waiting.append(evaluation)

    def wait(self) -> Sequence[Outcome]:
        return [execute(self.evaluator, self._waiting.pop(0), self.pruner)]


def execute(evaluator: Evaluator, evaluation: Evaluation, pruner: Pruner | None = None) -> Outcome:
    """Evaluate an allocation and return its outcome; its own errors yield ``failed``."""
    started, cpu = time.perf_counter(), time.process_time()
    steps: dict[str, float] = {}
    costs = set(evaluator.costs(evaluation.claim.allocation))

    def should_continue(step: int, metrics: Mapping[str, float]) -> bool:
        steps.update({f"{k}@{step}": v for k, v in metrics.items() if k not in costs})
        return pruner is None or pruner(evaluation.claim.budget_key, step, metrics)

    def outcome(state: Literal["complete", "failed", "pruned"], reason: str = "") -> Outcome:
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
        return Outcome(evaluation, state, {**metrics, **steps}, seconds, reason, spent)

    metrics: Mapping[str, float] = {}
    asked = None if pruner is None or evaluation.claim.probe else should_continue
    try:
        with contextlib.redirect_stdout(sys.stderr):  # of the user's code; stdout is for results
            metrics = evaluator.evaluate(
                evaluation.claim.allocation,
                final=evaluation.final,
                screening=evaluation.screening,
                weights=evaluation.claim.weights,
                should_continue=asked,
            )
    except PrunedError as stopped:
        metrics = evaluator.costs(evaluation.claim.allocation)
        return outcome("pruned", str(stopped))
    except (ObjectiveError, MemoryError, torch.OutOfMemoryError) as error:
        return outcome("failed", str(error) or "out of memory")
    except SystemExit as error:  # in the model or in a metric
        return outcome("failed", f"the evaluation called sys.exit({error.code!r})")
    except RuntimeError as error:
        if any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return outcome("failed", f"out of memory: {error}")
        raise
    return outcome("complete")


def schedule(
    study: Study,
    n_trials: int,
    executor: Executor,
    on_trial: OnTrial | None = None,
    start: Sequence[Allocation] = (),
) -> None:
    """Propose, evaluate and record until every budget has its number of trials.

    Args:
        study: The study; its strategy is bound.
        n_trials: Trials proposed for each budget, including failed ones. Probes are extra.
        executor: Runs the evaluations; left open.
        on_trial: Called with each trial of this process and the best one for its budget.
        start: Allocations to evaluate first, for each budget those that meet it.

    Raises:
        ObjectiveError: Three consecutive trials failed, or a proposal failed.
    """
    for problem in study.problems:
        fitting = [a for a in dict.fromkeys(start) if problem.meets(problem.indices(a))]
        _Loop(study, problem, n_trials, executor, on_trial, fitting).run()


@dataclass
class _Loop:
    """The trials for one budget."""

    study: Study
    problem: Problem
    n_trials: int
    executor: Executor
    on_trial: OnTrial | None
    start: Sequence[Allocation] = ()
    running: list[Claim] = field(default_factory=list)
    probes: Sequence[Allocation] = ()
    refused: int = 0
    best: Trial | None = None
    looked: float = -np.inf
    unsaid: list[str] = field(default_factory=list)  # reasons of the latest failures

    def run(self) -> None:
        self.study.store.history()
        phases = self.study.context.phases
        try:
            while not self.is_done():
                if self.running:
                    phase = "probes" if all(c.probe for c in self.running) else "trials"
                    with phases.timed(phase):
                        outcomes = self.executor.wait()
                    for outcome in outcomes:
                        if self.executor.elsewhere:
                            phases.add(phase, outcome.cpu_seconds)
                        self.finish(outcome)
                else:
                    check_time()
                    time.sleep(POLL)  # other processes evaluate the rest
                    self.study.store.history()
        except BaseException:
            self.study.store.interrupt(self.running)
            raise
        finally:
            self.report()

    def history(self) -> History:
        """All trials as of the last claim; outdated claims are not granted."""
        record = self.study.store
        return record.known().awaiting([c.allocation for c in (*self.running, *record.others())])

    def is_done(self) -> bool:
        """Fill the free slots of the executor; return whether no work is left."""
        while True:
            history = self.history()
            enough = len(history.candidates(self.problem)) >= self.n_trials
            if enough and not self.running:
                return True
            free = self.executor.slots - len(self.running)
            if free <= 0 or enough:
                return False
            check_time()
            wanted = self.wanted(history, free)
            if not wanted:
                if not history.pending and not self.running:
                    self.explain(history)
                return not history.pending
            granted = self.study.store.claim(wanted, self.running, self.n_trials)
            if not granted:
                # Another process claimed it first; it is pending now, so propose others.
                self.refused += 1
                if self.refused % ATTEMPTS:
                    continue
                return False
            self.refused = 0
            for claim in granted:
                self.running.append(claim)
                screening = claim.probe and self.study.strategy.screens
                final = self.study.final and not claim.probe
                self.executor.submit(Evaluation(claim, final, screening))

    def wanted(self, history: History, free: int) -> list[Claim]:
        """Claims to request next; empty while other processes evaluate probes."""
        strategy, problem = self.study.strategy, self.problem
        left = [a for a in self.probes if a not in history.found]
        if not left:
            self.probes = tuple(dict.fromkeys(strategy.probes(problem, history)))
            left = [a for a in self.probes if a not in history.found]
        if left:
            fresh = [a for a in left if a not in history.pending]
            return [Claim(a, problem.budget_key, probe=True) for a in fresh[:free]]
        busy = (*self.running, *self.study.store.others())
        busy_here = sum(c.budget_key == problem.budget_key and not c.probe for c in busy)
        room = self.n_trials - len(history.candidates(problem)) - busy_here
        if room <= 0:
            return []
        if first := [a for a in self.start if a not in history.proposed]:
            return [Claim(a, problem.budget_key) for a in first[: min(free, room)]]
        drawn = [self.study.context.seed, len(history.trials) + len(history.pending)]
        # Processes with equal counts would otherwise make equal proposals.
        rng = np.random.default_rng(drawn + [self.refused] * bool(self.refused))
        try:
            proposals = strategy.proposals(problem, history, min(free, room), rng)
        except ObjectiveError as error:  # for example, a training diverged
            dense = problem.allocation([0] * len(problem.errors))
            self.record(Claim(dense, problem.budget_key), "failed", {}, 0.0, str(error))
            raise
        for proposal in proposals:
            self.check(proposal.allocation)
        return [
            Claim(p.allocation, problem.budget_key, weights=str(p.weights or ""))
            for p in proposals
        ]

    def explain(self, history: History) -> None:
        """Say why fewer trials than wanted are made, unless the strategy needs only a few."""
        strategy, made = self.study.strategy, len(history.candidates(self.problem))
        if strategy.screens and self.unsaid and not any(not t.probe for t in history.complete):
            reason = self.unsaid.pop()
            raise ObjectiveError(f"no trial succeeded; the last failed: {shortened(reason)}")
        if strategy.endless and made < self.n_trials:
            logger.warning(
                "strategy %r stops after %d of %d trials for %s: it finds no allocation that is "
                "new and meets the budget. Offer more ranks or a looser budget for more trials.",
                strategy.name,
                made,
                self.n_trials,
                self.problem.budget_key,
            )

    def check(self, allocation: Allocation) -> None:
        self.study.context.factorisation.space.check(allocation)
        indices = self.problem.indices(allocation)
        if not self.problem.meets(indices):
            raise RankNASError(
                f"strategy {self.study.strategy.name!r} proposed an allocation that breaks the "
                f"budget {dict(self.problem.budget)}: {self.problem.fractions(indices)}."
            )

    def finish(self, outcome: Outcome) -> None:
        """Record the outcome of an evaluation; stop after repeated failures."""
        claim = outcome.evaluation.claim
        self.running.remove(claim)
        if outcome.state == "failed":
            self.unsaid.append(outcome.reason)
        else:
            self.report()
        if outcome.state == "complete":
            self.study.evaluator.remember(
                claim.allocation,
                outcome.metrics,
                final=outcome.evaluation.final,
                screening=outcome.evaluation.screening,
                weights=claim.weights,
            )
        self.record(claim, outcome.state, outcome.metrics, outcome.seconds, outcome.reason)
        history = self.study.store.known()
        if self.on_trial is not None and claim.allocation in history.found:
            self.on_trial(history.found[claim.allocation], self.best_of(history))
        last = history.trials[-FAILURES:]
        if len(last) == FAILURES and all(t.state == "failed" for t in last):
            self.unsaid = [reason for reason in self.unsaid if reason != last[-1].reason]
            raise ObjectiveError(
                f"{FAILURES} trials in a row failed, so the search stops; the last: "
                f"{shortened(last[-1].reason)}"
            )

    def report(self) -> None:
        """Log the failures since the last call, each reason once.

        They are held back until a trial succeeds, because the error that stops a search states
        the same reason.
        """
        for reason in dict.fromkeys(self.unsaid):
            logger.warning("a trial failed: %s", shortened(reason))
        self.unsaid.clear()

    def record(
        self,
        claim: Claim,
        state: Literal["complete", "failed", "pruned"],
        metrics: Mapping[str, float],
        seconds: float,
        reason: str,
    ) -> None:
        names = self.problem.objectives
        values = tuple(metrics[name] for name in names) if state == "complete" else ()
        trial = Trial(
            -1,  # the storage assigns the number
            claim.allocation,
            state,
            values,
            metrics,
            seconds,
            reason,
            claim.probe,
            claim.budget_key,
            claim.weights,
        )
        self.study.store.add(trial, names)

    def best_of(self, history: History) -> Trial | None:
        """The best trial so far, cached for a short time."""
        now, finished = time.monotonic(), len(history.candidates(self.problem))
        if now - self.looked > PATIENCE or finished >= self.n_trials:
            some = bool(history.feasible(self.problem))
            self.best = self.study.strategy.select(self.problem, history) if some else None
            self.looked = time.monotonic()
        return self.best
