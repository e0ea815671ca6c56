"""The plan of a comparison: what all seeds share, and the rows of what is not searched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rankNAS.budget import budget_key
from rankNAS.data.base import Data
from rankNAS.deadline import Deadline
from rankNAS.engine import objectives_of
from rankNAS.evaluation.context import Progress
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import HardwareModel
from rankNAS.objectives import ObjectiveBase, make_objective
from rankNAS.pipeline import requests
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.recipe import Recipe
from rankNAS.reporting.rows import DENSE_MODEL, Key, Row
from rankNAS.reporting.significance import BlockSums
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.settings import Settings
from rankNAS.strategies.base import Strategy
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import make_task

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Settings shared by all seeds; the fields are the arguments of `compare`."""

    model: nn.Module | Callable[[int], nn.Module]
    data: Data
    strategies: Mapping[str, Strategy]
    budgets: Sequence[Mapping[str, float]]
    task: str | Task | None
    objectives: Sequence[str | ObjectiveBase] | None
    n_trials: int
    training: TrainingConfig | None
    recipe: Recipe | None
    training_samples: int | None
    settings: Settings
    hardware: str | HardwareModel
    space: SearchSpace | None
    device: str | torch.device
    report: Progress
    deadline: Deadline | None = None
    block_sums: BlockSums | None = None

    def __post_init__(self) -> None:
        self.named_objectives()
        if self.n_trials < 1:
            raise UsageError(f"`n_trials` must be at least 1, got {self.n_trials}.")
        if self.training_samples is not None and self.training_samples < 1:
            raise UsageError(
                f"`training_samples` must be at least 1, got {self.training_samples}."
            )
        if self.training is not None and self.recipe is not None:
            raise UsageError("`training` is the recipe plain; give it or `recipe`, not both.")
        if self.settings.recovery is not None:
            raise UsageError(
                "answers are compared without training and after `training`; leave "
                "`Settings.recovery` out."
            )

    def keys(self, seed: int) -> list[Key]:
        """Keys of all rows of a seed."""
        pairs = [(name, budget_key(budget)) for name in self.strategies for budget in self.budgets]
        return [(*pair, seed) for pair in [(DENSE_MODEL, DENSE_MODEL), *pairs]]

    def named_objectives(self) -> list[ObjectiveBase]:
        """The objectives as far as they are known without a model.

        Raises:
            UsageError: One of them is wrong.
        """
        if self.task is not None:
            return objectives_of(self.objectives, make_task(self.task))
        # A loss stands for the first metric of a task that is unknown yet.
        return [make_objective(objective) for objective in self.objectives or ("loss",)]

    def refused_rows(
        self, seed: int, refusals: Mapping[str, str], missing: set[Key]
    ) -> Iterator[Row]:
        """The rows of the strategies that cannot do what is asked."""
        for name, reason in refusals.items():
            for key in self.keys(seed):
                if key[0] == name and key in missing:
                    yield Row(*key, status=reason)

    def is_late(self) -> bool:
        """Whether the time limit has ended."""
        return self.deadline is not None and self.deadline.passed

    @property
    def not_begun(self) -> str:
        """The status of a row whose search has not begun in time."""
        assert self.deadline is not None
        return f"not searched: the time limit of {self.deadline.seconds:g} s had ended"

    def late_rows(self, seed: int, names: Iterable[str], missing: set[Key]) -> Iterator[Row]:
        for key in self.keys(seed):
            if key in missing and key[0] in (DENSE_MODEL, *names):
                yield Row(*key, status=self.not_begun)

    def accepted(self, refusals: Mapping[str, str], missing: set[Key]) -> dict[str, Strategy]:
        """The other strategies; none if no missing row concerns them or the dense model."""
        accepted = {n: s for n, s in self.strategies.items() if n not in refusals}
        concerned = any(key[0] in (DENSE_MODEL, *accepted) for key in missing)
        return accepted if concerned else {}

    def by_norm(self, strategies: Mapping[str, Strategy]) -> list[list[str]]:
        """The names of the strategies that decompose in one norm, by norm."""
        groups: dict[str | None, list[str]] = {}
        for name, strategy in strategies.items():
            groups.setdefault(self.settings.of(strategy).norm, []).append(name)
        return list(groups.values())

    def refusals(self, objectives: Sequence[ObjectiveBase]) -> dict[str, str]:
        """Reasons, by name, of the strategies that cannot do what is asked."""
        asked = requests(self.data, self.budgets, objectives, self.settings)
        refusals: dict[str, str] = {}
        for name, strategy in self.strategies.items():
            for request in asked:
                try:
                    strategy.check(request)
                except UsageError as error:
                    refusals.setdefault(name, str(error))
        return refusals
