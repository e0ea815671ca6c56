"""The factors and losses of all choices of a model, in memory or streamed through files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from rankNAS.compression.calibration import POOLED, calibrate, statistics_key
from rankNAS.compression.curvature import BATCH, second_order_losses
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation, OneLayer, factorise
from rankNAS.compression.factors import Screen, Select
from rankNAS.compression.streaming import (
    exceeds,
    factorise_streamed,
    samples_at_once,
    statistics_bytes,
)
from rankNAS.data.samples import Samples
from rankNAS.deadline import TimeLimitError, check_time
from rankNAS.decompositions.norms import NormName, Statistics
from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import fingerprint
from rankNAS.phases import Phases
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches, input_batches
from rankNAS.trees import device_of

__all__ = ["Preparation"]

logger = logging.getLogger(__name__)
TOKENS = 4096  # positions of a pass over the whole model, whose outputs are all in memory


@dataclass(frozen=True)
class Preparation:
    """How a model is calibrated and factorised.

    Args:
        model: The dense model.
        space: Its space.
        samples: Calibration samples.
        task: Reads inputs and outputs.
        norm: The error norm.
        select: See `factorise`.
        screen: See `factorise`.
        salt: Identifies the selection.
        batch_norm: Whether batch-norm statistics are re-estimated after truncation.
        moments: Whether strategies need the spectra of the layers' outputs.
        memory: Bytes of statistics and factors, as estimated, beyond which they are streamed.
        seed: The random seed.
        report: Called with a stage's name, steps done, and steps in all.
        phases: Takes the CPU seconds of each phase.
    """

    model: nn.Module
    space: SearchSpace
    samples: Samples
    task: Task
    norm: NormName
    select: Select
    screen: Screen
    salt: str
    batch_norm: bool
    moments: bool
    memory: int
    seed: int
    report: Callable[[str, int, int], None]
    phases: Phases = field(default_factory=Phases)

    def factorised(
        self, few: Callable[[SearchSpace], SearchSpace], measure: bool
    ) -> tuple[Factorisation, dict[str, list[float]], bool]:
        """Calibrate the model and factorise every layer.

        Args:
            few: The space with the choices of uniform answers alone, for a time that is short.
            measure: Whether to measure the losses of choices where the norm takes gradients, and
                all is in memory. Otherwise they follow from the norm.

        Returns:
            The factors, the losses of all choices, and whether the time sufficed.
        """
        return self._streamed(few) if self._streams else self._in_memory(few, measure)

    @property
    def _streams(self) -> bool:
        if not exceeds(self.space, self.norm, self.memory):
            return False
        needed = statistics_bytes(self.space.layers, self.norm)
        logger.info("statistics and factors would need %.1f GB: they are streamed", needed / 1e9)
        return True

    @cached_property
    def _centred(self) -> bool | None:
        return None if self.batch_norm else False

    def _on_layer(self, done: int, total: int) -> None:
        self.report("factorise", done, total)
        check_time()

    def _in_memory(
        self, few: Callable[[SearchSpace], SearchSpace], measure: bool
    ) -> tuple[Factorisation, dict[str, list[float]], bool]:
        statistics: dict[str, Statistics] = {}
        size = samples_at_once(self.space, BATCH, TOKENS)
        try:
            with self.phases.timed("calibrate"):
                statistics = calibrate(
                    self.model,
                    self.space,
                    self.samples,
                    self.task,
                    norm=self.norm,
                    batch_size=size,
                    seed=self.seed,
                    cache=cache_folder() / "calibration",
                    on_batch=lambda done, total: self.report("calibrate", done, total),
                )
            with self.phases.timed("factorise"):
                found = factorise(
                    self.model,
                    self.space,
                    statistics,
                    norm=self.norm,
                    centred=self._centred,
                    select=self.select,
                    screen=self.screen,
                    on_layer=self._on_layer,
                )
        except TimeLimitError:
            norm = self.norm if statistics else "weight"
            with self.phases.timed("answer"):
                found = factorise(
                    self.model, few(self.space), statistics, norm=norm, centred=self._centred
                )
            return found, found.losses(), False
        if self.norm != "fisher" or not measure:
            return found, found.losses(), True
        try:
            with self.phases.timed("losses"):
                losses = second_order_losses(
                    found,
                    self.samples,
                    self.task,
                    statistics if self.batch_norm else None,
                    seed=self.seed,
                    batch_size=size,
                    cache=cache_folder() / "calibration",
                    on_batch=lambda done, total: self.report("measure losses", done, total),
                )
        except TimeLimitError:
            losses = found.losses()
        return found, losses, True

    def _streamed(
        self, few: Callable[[SearchSpace], SearchSpace]
    ) -> tuple[Factorisation, dict[str, list[float]], bool]:
        model = with_plain_layers(self.model)
        batches = self._batches()
        known = statistics_key(model, self.space, batches, self.task, self.norm, self.seed)
        key = fingerprint({}, f"{known} {self._centred} {self.salt}")
        store = FactorStore(cache_folder() / "factors", key, moments=self.moments)
        each = OneLayer(model, self.norm, self._centred, self.select, self.screen, store)
        try:
            with self.phases.timed("calibrate"):
                found = factorise_streamed(
                    self.space,
                    batches,
                    self.task,
                    each,
                    store,
                    seed=self.seed,
                    on_layer=self._on_layer,
                    on_batch=lambda done, total: self.report("calibrate", done, total),
                    timed=self.phases.timed,
                )
        except TimeLimitError:
            with self.phases.timed("answer"):
                space = few(self.space)
                found = factorise(model, space, centred=self._centred, store=store)
            return found, found.losses(), False
        return found, found.losses(), True

    def _batches(self) -> InputBatches:
        """The calibration inputs, so many at once as a block takes."""
        count = max(1, len(self.samples) // POOLED) if self.norm == "pooled" else None
        return input_batches(
            self.samples,
            samples_at_once(self.space, BATCH),
            task=self.task,
            device=device_of(self.model),
            count=count,
            even=count is not None,
        )
