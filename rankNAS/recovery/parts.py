"""`Part`: what a training does beside its loss, and the exponential average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

__all__ = ["Average", "Gradients", "Part"]

#: Sets the gradients of a batch at its place (`rankNAS.recovery.loop.Place`), and gives its loss.
Gradients: TypeAlias = Callable[[Any, tuple[int, int] | None], float]


class Part:
    """What a training does beside its loss; this base class does nothing."""

    def exempt(self) -> Sequence[Tensor]:
        """Parameters without the optimiser's weight decay."""
        return ()

    def counts(self, size: int) -> Sequence[int]:
        """The numbers of samples of the first epochs, if it chooses them (`chosen`).

        All later epochs have as many as the last one of these.

        Args:
            size: The number of all samples.
        """
        return ()

    def begin_epoch(self, number: int) -> None:
        """Called before each epoch, numbered from 0, and before a resumed one."""

    def gradients(self, compute: Gradients, rate: float) -> Gradients:
        """How the gradients of a step at a learning rate are computed; by default as before."""
        return compute

    def passes(self, epoch: int) -> float:
        """The time of a step in an epoch, by that of a step without this part."""
        return 1.0

    def chosen(self) -> Tensor | None:
        """The positions (n,) of the samples of the epoch that has begun; None for all."""
        return None

    def before_step(self, rate: float) -> None:
        """Called when gradients are known, before the optimiser's step at a learning rate."""

    def after_step(self, step: int) -> None:
        """Called after each step, numbered from 0."""

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Context in which the network has the weights that the training would give it now."""
        yield

    def average(self) -> None:
        """Called once after the last step: the network takes these weights."""

    def finish(self) -> None:
        """Called at the end: the network takes its final form."""

    def state_dict(self) -> dict[str, Any]:
        """The state of a checkpoint, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint."""


@final
class Average(Part):
    """An exponential moving average of the weights, which the network takes at the end.

    After step t = 0, 1, … the average moves towards the weights by a share 1 - d_t, where
    d_t = min(decay, (1 + t) / (10 + t)) forgets the first weights sooner.

    Args:
        network: The network; what is not trained is not averaged.
        decay: Its limit, in [0, 1).

    References:
        Polyak and Juditsky, SIAM Journal on Control and Optimization 1992: averages of iterates.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], share)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.parameters]
        self.average()
        try:
            yield
        finally:
            _fill(self.parameters, kept)

    def average(self) -> None:
        _fill(self.parameters, self.averages)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _fill(self.averages, state["averages"])


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
