"""Recipe ``swiftlearn``: training on a shrinking part of the samples, those that matter most.

The first epochs use all samples. Then each sample gets a score, and the epochs use samples with
large ones. After some epochs all samples are scored again, so that a sample can return. The
scoring is a forward pass over all samples, and its time is part of the training's.

References:
    Hajimolahoseini et al., 2023, arXiv 2311.15134: SwiftLearn. The paper's own score could not be
    read, so the scores here are those of the literature on data pruning.
    Efraimidis and Spirakis, Information Processing Letters 2006: weighted draws without
    replacement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.importance import SCORES, Score, check_score, importance
from rankNAS.recovery.parts import Part
from rankNAS.recovery.recipe import Job, Setup
from rankNAS.tasks.base import Task

__all__ = ["Subset", "SwiftLearn"]

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class SwiftLearn(Distil):
    """`Distil` on a part of the samples.

    The batches of an epoch are new, so that the dense network runs in every step unless `distill`
    is 0.

    Args:
        keep: Share of the samples that is kept in the end.
        score: ``loss``, ``gradient`` (its norm with respect to the outputs), ``entropy`` or
            ``margin`` of the predicted classes, ``random``; or a function of an
            `rankNAS.recovery.importance.Outcome` that returns a number for each sample.
        warm_up: Epochs on all samples before.
        refresh: Epochs after which all samples are scored again.
        shrink: Epochs after the warm-up in which the share falls from 1 to `keep`; with 1 it falls
            at once.
        schedule: How it falls: ``linear``, or ``geometric`` by an equal factor in each epoch.
        draw: ``weighted`` draws samples in every epoch without replacement, with probabilities in
            proportion to their scores; ``top`` takes those with the largest scores, which was
            measured to be worse than a random choice where few are kept.
    """

    name: ClassVar[str] = "swiftlearn"
    keep: float = 0.3
    score: str | Score = "gradient"
    warm_up: int = 2
    refresh: int = 5
    shrink: int = 1
    schedule: Literal["linear", "geometric"] = "geometric"
    draw: Literal["top", "weighted"] = "weighted"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("keep", 0 < self.keep <= 1, "in (0, 1], for a subset that is not empty")
        self._require("warm_up", 0 <= self.warm_up < self.epochs, "from 0 to the epochs minus 1")
        self._require("refresh", self.refresh >= 1, "at least 1")
        self._require("shrink", self.shrink >= 1, "at least 1")
        self._require("schedule", self.schedule in ("linear", "geometric"), "linear or geometric")
        self._require("draw", self.draw in ("top", "weighted"), "top or weighted")
        if not callable(self.score) and self.score not in SCORES:
            raise UnknownNameError("score", str(self.score), SCORES)

    def check(self, task: Task, dense: bool = True) -> None:
        super().check(task, dense)
        if isinstance(self.score, str):
            check_score(self.score, task)

    def share(self, epoch: int) -> float:
        """The share of the samples in an epoch, numbered from 0."""
        passed = min(1.0, max(0, epoch - self.warm_up + 1) / self.shrink)
        if self.schedule == "linear":
            return 1 - passed * (1 - self.keep)
        return float(self.keep**passed)

    def count(self, epoch: int, size: int) -> int:
        """The number of samples of an epoch, of so many in all."""
        return round(self.share(epoch) * size)

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        subset = Subset(self, job)
        with super().prepared(job) as setup:
            yield replace(setup, parts=[subset, *setup.parts], variants=0)


@final
class Subset(Part):
    """Chooses the samples of each epoch.

    Args:
        recipe: How they are chosen.
        job: The network, the data and the task.

    Attributes:
        seconds: Seconds of all scoring so far.

    Raises:
        UsageError: The smallest subset is empty.
    """

    def __init__(self, recipe: SwiftLearn, job: Job) -> None:
        self.recipe, self.job, self.seconds = recipe, job, 0.0
        self.batch_size = recipe.config(job).batch_size
        self._scores: Tensor | None = None
        self._scored = -1  # the epoch before which they were found
        self._epoch = 0
        if not recipe.count(recipe.epochs, len(job.data)):
            raise UsageError(
                f"recipe 'swiftlearn': keep is {recipe.keep}, so the subset of the "
                f"{len(job.data)} samples is empty; keep at least {1 / len(job.data):.2g}."
            )

    def counts(self, size: int) -> Sequence[int]:
        epochs = min(self.recipe.epochs, self.recipe.warm_up + self.recipe.shrink)
        return [self.recipe.count(epoch, size) for epoch in range(epochs)]

    def begin_epoch(self, number: int) -> None:
        self._epoch = number
        after = number - self.recipe.warm_up
        if after < 0 or self._share() == 1:
            return
        due = number - after % self.recipe.refresh
        if self._scores is None or self._scored < due:
            self._score(number)

    def chosen(self) -> Tensor | None:
        if self._epoch < self.recipe.warm_up or self._share() == 1:
            return None
        assert self._scores is not None
        keys = self._scores
        if self.recipe.draw == "weighted":
            keys = self._drawn(keys)
        order = keys.sort(descending=True, stable=True).indices
        return order[: self.recipe.count(self._epoch, len(keys))].sort().values

    def finish(self) -> None:
        logger.info("the samples were scored in %.2f s of this session", self.seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores, "scored": self._scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scores, self._scored = state["scores"], state["scored"]

    def _share(self) -> float:
        return self.recipe.share(self._epoch)

    def _score(self, number: int) -> None:
        score = self.recipe.score
        began = time.monotonic()
        self._scores = importance(
            self.job.network,
            self.job.data,
            self.job.task,
            SCORES[score] if isinstance(score, str) else score,
            batch_size=self.batch_size,
            device=self.job.device,
            seed=self._seed(0),
        )
        self.job.network.train()
        self._scored = number
        self.seconds += time.monotonic() - began

    def _drawn(self, scores: Tensor) -> Tensor:
        """Random keys, the largest of which are a draw in proportion to the scores."""
        if bool((scores < 0).any()):
            raise UsageError(
                f"recipe 'swiftlearn': a score is {float(scores.min()):.3g}, but a weighted draw "
                "needs scores of 0 or more; give draw=top."
            )
        generator = torch.Generator().manual_seed(self._seed(1))
        uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64)
        return uniform.log().neg().log().neg() + scores.double().log()

    def _seed(self, purpose: int) -> int:
        return (self.job.seed * 7_368_787 + 2 * self._epoch + purpose) % 2**31
