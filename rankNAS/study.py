"""A study: the trials of a search and the networks they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from rankNAS import artifact
from rankNAS.allocation import Allocation
from rankNAS.data import Data, Splits
from rankNAS.evaluation import Evaluator, test_metrics
from rankNAS.exceptions import StudyError
from rankNAS.pareto import non_dominated
from rankNAS.record import Record
from rankNAS.strategies.base import History, Problem, Strategy, Trial

__all__ = ["Study", "best_trial", "front"]


@dataclass
class Study:
    """What `search` returns.

    Args:
        name: The study's name in its storage.
        record: The Optuna study behind it.
        problem: Tables, budgets and directions.
        strategy: What proposed the trials.
        evaluator: Evaluates further allocations on the same terms.
        data: The data and
        splits: its parts.
        dense: Metrics of the dense model on the validation data, and its costs.
        model: How the dense model is built, for `save`; empty for a model of the caller's.
        seconds: Wall-clock time of this session of the search.

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
    record: Record
    problem: Problem
    strategy: Strategy
    evaluator: Evaluator
    data: Data
    splits: Splits
    dense: dict[str, float]
    model: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def history(self) -> History:
        """All finished trials."""
        return self.record.history()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All finished trials, oldest first."""
        return self.history.trials

    @property
    def best(self) -> Trial:
        """The best trial by the first objective.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        return best_trial(self.problem, self.history)

    def pareto_front(self) -> list[Trial]:
        """The trials that no other dominates in the objectives, best in the first one first."""
        return front(self.problem, self.history)

    def to_pandas(self) -> pd.DataFrame:
        """One row a trial: number, state, metrics, and a column ``layer:NAME`` per layer."""
        rows = [
            {"number": t.number, "state": t.state, "seconds": t.seconds, **t.metrics}
            | {f"layer:{name}": label for name, label in t.allocation.labels().items()}
            for t in self.trials
        ]
        return pd.DataFrame(rows)

    def materialise(self, allocation: Allocation | None = None) -> nn.Module:
        """The compressed network of an allocation (by default the best), an ordinary module."""
        network = self.evaluator.network(
            self.best.allocation if allocation is None else allocation
        )
        return network.cpu()

    def test(self, network: nn.Module | None = None) -> dict[str, float]:
        """Loss and accuracy on the test data, which the search never sees."""
        network = self.materialise() if network is None else network
        return test_metrics(network, self.splits.test, device=self.evaluator.device)

    def save(
        self,
        path: Path | str,
        allocation: Allocation | None = None,
        network: nn.Module | None = None,
    ) -> Path:
        """Write a compressed network (by default the best) as safetensors; see `rankNAS.load`."""
        allocation = self.best.allocation if allocation is None else allocation
        network = self.materialise(allocation) if network is None else network
        metrics = self.evaluator.evaluate(allocation)
        return artifact.save(network, allocation, path, model=self.model, metrics=metrics)


def best_trial(problem: Problem, history: History) -> Trial:
    """The best complete trial by the first objective; of equals, the one of the smaller loss.

    Raises:
        StudyError: There is none.
    """
    if not history.complete:
        raise StudyError("no trial of the study has succeeded yet.")
    sign = 1.0 if problem.directions[0] == "maximize" else -1.0
    return max(
        history.complete,
        key=lambda t: (sign * t.values[0], -t.metrics.get("loss", 0.0), -t.number),
    )


def front(problem: Problem, history: History) -> list[Trial]:
    """The complete trials that no other dominates, best in the first objective first."""
    if not history.complete:
        return []
    sign = [1.0 if d == "maximize" else -1.0 for d in problem.directions]
    values = [[s * v for s, v in zip(sign, t.values, strict=True)] for t in history.complete]
    keep = non_dominated(values)
    kept = [(v, t) for v, t, k in zip(values, history.complete, keep, strict=True) if k]
    return [t for _, t in sorted(kept, key=lambda pair: (-pair[0][0], pair[1].number))]
