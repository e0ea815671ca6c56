"""A study: the trials of a search and their networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.copies import copied
from rankNAS.data.base import Data
from rankNAS.data.samples import Samples, Source
from rankNAS.data.splits import Splits
from rankNAS.deadline import Deadline
from rankNAS.evaluation.context import SearchContext
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.outputs import Reference, dense_reference, network_metrics
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.models import artifact
from rankNAS.models.inputs import InputSpec
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.loop import Report
from rankNAS.recovery.progressive import chain_ranks
from rankNAS.recovery.recipe import Job, Recipe, make_recipe
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.trainer import train
from rankNAS.renamed import renamed
from rankNAS.solver.pareto import non_dominated
from rankNAS.storage.store import StudyStore
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History, Trial, objective_values, rankings
from rankNAS.strategies.problem import Problem
from rankNAS.tasks.base import Task

__all__ = ["Study", "front"]

DESCRIBED = 64  # samples from which the range of integer inputs is read


@renamed(answer="solution", record="store", bench="context")
@dataclass
class Study:
    """The result of `search`.

    Args:
        name: The study's name in its storage.
        store: The Optuna study behind it.
        problems: Tables, budgets and directions; one problem per budget, with shared tables.
        strategy: The strategy that proposed the trials.
        context: The model, its factors, the evaluator and the parts of the data.
        data: The data.
        dense: Metrics of the dense model on the validation data, and its costs.
        model: Recipe of the dense model, for `save`; empty for a model of the caller.
        seconds: Wall-clock time of this session of the search.
        limit: The time limit, if it ended the search.
        ended: The phase in which it did.
        stopgaps: By budget key, the uniform answer where no trial had finished by then. It is
            measured, but is not in the study's record.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from rankNAS.engine import search
        >>> x, y = torch.randn(200, 64), torch.randint(0, 4, (200,))
        >>> data = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])
        >>> sizes = [(64, 64), (64, 64), (64, 4)]
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
        >>> study = search(model, data, budget={"macs": 0.5}, strategy="random", n_trials=3)
        >>> len(study.to_pandas()), study.best in study.pareto_front()
        (3, True)
        >>> study.materialise()(x[:5]).shape
        torch.Size([5, 4])
    """

    name: str
    store: StudyStore
    problems: tuple[Problem, ...]
    strategy: Strategy
    context: SearchContext
    data: Data
    dense: dict[str, float]
    model: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    limit: Deadline | None = None
    ended: str | None = None
    stopgaps: dict[str, Trial] = field(default_factory=dict)

    @property
    def history(self) -> History:
        """All finished trials."""
        return self.store.history()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All finished trials, oldest first."""
        return self.history.trials

    @property
    def problem(self) -> Problem:
        """The problem of the first budget."""
        return self.problems[0]

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator, for further allocations under the same settings."""
        return self.context.evaluator

    @property
    def splits(self) -> Splits:
        """The parts of the data."""
        return self.context.splits

    @property
    def task(self) -> Task:
        """What the model is for."""
        return self.context.task

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds of this session by phase: of this process, and of workers in trials."""
        return dict(self.context.phases.seconds)

    @property
    def limit_note(self) -> str:
        """What the time limit has ended and what the answers are; empty if it has not."""
        if self.limit is None:
            return ""
        note = f"the time limit of {self.limit.seconds:g} s ended in the phase {self.ended!r}; "
        if not self.stopgaps:
            return note + "the answer is the best trial so far"
        weights = "" if self.context.complete else ", decomposed for this allocation alone"
        weights += " and without statistics" * (self.ended in ("calibrate", "time"))
        return (
            f"{note}no trial had finished for {'; '.join(self.stopgaps)}, so the answer is the "
            f"uniform allocation{weights}"
        )

    @property
    def final(self) -> bool:
        """Whether trials, except probes, evaluate the network that `materialise` returns."""
        return self.strategy.refits or self.evaluator.recovery is not None

    def metrics_of(self, chosen: Trial, network: nn.Module) -> dict[str, float]:
        """The metrics of a trial's network: of the trial, unless it was trained further."""
        if not self._retrained:
            return dict(chosen.metrics)
        return self.evaluator.metrics_of(chosen.allocation, copied(network))

    @property
    def _retrained(self) -> bool:
        """Whether returned networks are refined or trained after what trials measure."""
        return self.evaluator.refiner is not None or self.strategy.finishes

    @property
    def best(self) -> Trial:
        """The strategy's solution for the first budget, usually the best trial that meets it.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        return self.solution(self.problem)

    def solution(self, problem: Problem) -> Trial:
        """The strategy's solution for one of the budgets.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        stopgap = self.stopgaps.get(problem.budget_key)
        return self.strategy.select(problem, self.history) if stopgap is None else stopgap

    def pareto_front(self) -> list[Trial]:
        """The Pareto front of the trials within the first budget, sorted by the first objective.

        The best trial is one of them.
        """
        return front(self.problem, self.history)

    def to_pandas(self) -> pd.DataFrame:
        """One row per trial: number, state, metrics, and a column ``layer:NAME`` per layer."""
        rows = [
            {"number": t.number, "state": t.state, "probe": t.probe, "budget_key": t.budget_key}
            | {"seconds": t.seconds, **t.metrics}
            | {f"layer:{name}": label for name, label in t.allocation.labels().items()}
            for t in self.trials
        ]
        return pd.DataFrame(rows)

    def materialise(self, allocation: Allocation | None = None) -> nn.Module:
        """The compressed network of an allocation (by default the best), as a plain module."""
        allocation = self.best.allocation if allocation is None else allocation
        with self.context.phases.timed("answer"):
            stopgap = self._stopgap(allocation) is not None
            network = self.evaluator.network(
                allocation, trained=not stopgap, weights=self.weights_of(allocation)
            )
            if not stopgap:
                network = self.strategy.finish(network, allocation, self.context)
            return network.cpu()

    def weights_of(self, allocation: Allocation) -> str:
        """The file of the weights that the search has trained for an allocation; empty if none."""
        if self._stopgap(allocation) is not None:
            return ""
        found = self.history.found.get(allocation)
        return "" if found is None else found.weights

    def test(self, network: nn.Module | None = None) -> dict[str, float]:
        """The task's metrics on the test data, which the search never sees.

        Raises:
            StudyError: There are no test data.
        """
        if self.splits.test is None:
            raise StudyError(
                f"{self.data.name} has no test data; give a pair (train, test), or see the "
                "validation metrics of the trials."
            )
        network = self.materialise() if network is None else network
        return self.measure(network, self.splits.test, self._test_reference)

    def measure(
        self, network: nn.Module, samples: Samples, reference: Reference | None = None
    ) -> dict[str, float]:
        """The task's metrics of a network on samples.

        Args:
            network: The network.
            samples: The samples.
            reference: From `reference` for the same samples; made here if None.
        """
        device = self.evaluator.device
        with self.context.phases.timed("test"):
            reference = reference or self.reference(samples)
            return network_metrics(network, samples, self.task, reference=reference, device=device)

    def reference(self, samples: Samples) -> Reference:
        """The dense model's predictions for samples, for several calls of `measure`."""
        model, device = self.context.factorisation.model, self.evaluator.device
        return dense_reference(model, samples, self.task, device=device)

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """The form of the model's arguments as JSON values; None if they cannot be described."""
        example = self.task.inputs_of(self.splits.calibration.example(DESCRIBED))
        try:
            return InputSpec.of(example).to_json()
        except UsageError:
            return None

    @cached_property
    def _test_reference(self) -> Reference | None:
        if self.splits.test is None:
            return None
        return self.reference(self.splits.test)

    def finetune(
        self,
        network: nn.Module,
        dense: nn.Module,
        config: TrainingConfig,
        *,
        data: Source | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> nn.Module:
        """Train a compressed network in place, on the training data or a part of it.

        Args:
            network: A network from `materialise`.
            dense: The teacher model, if the configuration distills; unchanged.
            config: The training configuration.
            data: Other training data.
            on_step: As for `train`.
        """
        with self.context.phases.timed("finetune"):
            return train(
                network,
                self.splits.training if data is None else data,
                config,
                task=self.task,
                augmentation=self.splits.augmentation,
                teacher=copied(dense),
                device=self.evaluator.device,
                on_step=on_step,
            )

    def recover(
        self,
        network: nn.Module,
        dense: nn.Module,
        recipe: str | Recipe,
        *,
        data: Samples | None = None,
        keeps_best: bool = True,
        on_member: Callable[[int], object] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> Report:
        """Train a compressed network in place by a recipe, on the training data.

        Args:
            network: A network from `materialise`.
            dense: The dense model; unchanged.
            recipe: As for `rankNAS.recover`.
            data: Other training data.
            keeps_best: Whether a time limit ends it with the best weights so far; otherwise it
                raises a TimeLimitError.
            on_member: Called after each training of a recipe of several, with its number from 0.
            on_step: Called after each step with its number, the number of steps and the loss.

        Raises:
            UsageError: As for `rankNAS.recover`.
        """
        job = Job(
            network,
            self.splits.training if data is None else data,
            self.task,
            copied(dense),
            self.splits.augmentation,
            torch.device(self.evaluator.device),
            self.context.seed,
        )
        chosen = make_recipe(recipe)
        with self.context.phases.timed("finetune" if chosen.name == "plain" else "recover"):
            return run_recipe(
                chosen, job, keeps_best=keeps_best, on_member=on_member, on_step=on_step
            )

    def save_member(
        self, path: Path | str, allocation: Allocation, network: nn.Module
    ) -> dict[str, Any]:
        """Write a network at other ranks than those of an allocation; see `Progressive`.

        Args:
            path: The file.
            allocation: The allocation, whose operators the network has.
            network: The network.

        Returns:
            Its file, its parameters and the task's metrics on the validation samples.
        """
        ranks = chain_ranks(network)
        choices = {
            name: choice
            if name not in ranks
            else replace(choice, rank=(*choice.rank[:-1], ranks[name]))
            for name, choice in allocation.items()
        }
        metrics = self.measure(network, self.splits.validation)
        model = {"inputs": self.inputs, **self.model}
        saved = artifact.save(
            copied(network).cpu(), Allocation.of(choices), path, model=model, metrics=metrics
        )
        params = sum(p.numel() for p in network.parameters())
        return {"artifact": str(saved), "params": params, **metrics}

    def save(
        self,
        path: Path | str,
        allocation: Allocation | None = None,
        network: nn.Module | None = None,
    ) -> Path:
        """Write a compressed network (by default the best) as safetensors; see `rankNAS.load`."""
        allocation = self.best.allocation if allocation is None else allocation
        network = self.materialise(allocation) if network is None else network
        found = self._stopgap(allocation) or self.history.found.get(allocation)
        if self._retrained:  # no trial has measured this network
            metrics = self.evaluator.metrics_of(allocation, copied(network))
        elif found is not None and found.state == "complete" and not found.probe:
            metrics = dict(found.metrics)
        else:
            metrics = self.evaluator.evaluate(
                allocation, final=self.final, weights=self.weights_of(allocation)
            )
        model = {"inputs": self.inputs, **self.model}
        return artifact.save(network, allocation, path, model=model, metrics=metrics)

    def _stopgap(self, allocation: Allocation) -> Trial | None:
        """The uniform answer of that allocation, if it is one."""
        return next((t for t in self.stopgaps.values() if t.allocation == allocation), None)


def front(problem: Problem, history: History) -> list[Trial]:
    """The Pareto front of the trials within the budget, sorted by the first objective.

    With one objective, the trials of the best rank (`rankings`).
    """
    trials = history.feasible(problem)
    if not trials:
        return []
    ranked = rankings if len(problem.objectives) == 1 else objective_values
    values = ranked(problem, trials).tolist()
    keep = non_dominated(values)
    kept = [(v, t) for v, t, k in zip(values, trials, keep, strict=True) if k]
    return [t for _, t in sorted(kept, key=lambda pair: (-pair[0][0], pair[1].number))]
