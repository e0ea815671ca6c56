"""Recipe ``freeze``: sequential freezing; in each epoch one group of the factors is trained.

A frozen factor needs no gradient of its own, which saves a part of the backward pass. Of two
factors, the second is trained in even epochs and the first in odd ones; of three, the core and the
outer ones. All other weights are always trained.

References:
    Hajimolahoseini, Ahmed and Liu, 2023, arXiv 2309.03824: sequential freezing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from rankNAS.recovery.distil import Distil
from rankNAS.recovery.parts import Part
from rankNAS.recovery.products import chains
from rankNAS.recovery.recipe import Job, Setup

__all__ = ["Freeze", "Freezing"]


@final
@dataclass(frozen=True, kw_only=True)
class Freeze(Distil):
    """`Distil` with one group of factors frozen in each epoch.

    Args:
        period: Epochs after which the groups change.
    """

    name: ClassVar[str] = "freeze"
    period: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("period", self.period >= 1, "at least 1")

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        with super().prepared(job) as setup:
            freezing = Freezing(job.network, self.period)
            try:
                yield Setup(setup.loss, [freezing, *setup.parts], setup.variants)
            finally:
                freezing.thaw()


@final
class Freezing(Part):
    """Freezes one of two groups of factors in each epoch.

    Neither the state of the optimiser nor a decay moves what is frozen, because it has no
    gradient.

    Args:
        network: The network.
        period: Epochs after which the groups change.
    """

    def __init__(self, network: nn.Module, period: int) -> None:
        self.period = period
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for chain in chains(network):
            for number, weight in enumerate(chain.weights):
                assert isinstance(weight, nn.Parameter)
                if weight.requires_grad:
                    groups[number % 2].append(weight)
        self.groups = groups  # outer factors, and the others

    def begin_epoch(self, number: int) -> None:
        trained = 1 - number // self.period % 2
        for group, parameters in enumerate(self.groups):
            for parameter in parameters:
                parameter.requires_grad_(group == trained)
                if group != trained:
                    parameter.grad = None

    def thaw(self) -> None:
        """Let all factors be trained again."""
        for parameters in self.groups:
            for parameter in parameters:
                parameter.requires_grad_(True)
