"""A team of local processes that train one network: one leads, the others follow it.

The leader runs the training as if it were alone. All others make the same steps from the same
seeds, each on its own part of every batch, and exchange gradients with it (`GreedyLore`). Before
each step the leader sends an order: to make the step, to send what only they know for a
checkpoint, or to stop. What depends on the clock is thus decided by the leader alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankNAS.recovery.greedylore import GreedyLore
from rankNAS.recovery.parts import Part
from rankNAS.trees import rows, size_of

__all__ = ["DismissedError", "Team"]

STEP, STATE, STOP = range(3)  # orders


class DismissedError(Exception):
    """The leader has told this process to stop."""


@final
class Team(Part):
    """The place of this process in a team; a process group must exist.

    Args:
        network: The network, equal in all processes.
        lore: Exchanges gradients.
        seed: The seed of the training.
        failed: Called with an error of an exchange; it raises another one if it knows the cause.

    Attributes:
        rank: The number of this process; 0 leads.
        size: The number of processes.
        idle: Whether the others wait for an order.
    """

    def __init__(
        self,
        network: nn.Module,
        lore: GreedyLore,
        seed: int,
        failed: Callable[[RuntimeError], None] = lambda error: None,
    ) -> None:
        self.network, self.lore, self.seed = network, lore, seed
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.idle = True
        self._failed = failed

    def least(self, batch_size: int) -> int:
        """The fewest samples of a batch: two for each process, as a batch norm needs."""
        return int(min(2 * self.size, batch_size))

    def begin_step(self, step: int, total: int) -> int:
        """Called before each step by all processes.

        Args:
            step: The number of the step, from 0.
            total: The number of all steps.

        Returns:
            The number of all steps that the leader has given.

        Raises:
            DismissedError: The leader has told this process to stop.
        """
        if self.rank:
            total = self._obeyed()
        else:
            self._order(STEP, total)
        self.idle = False
        # For dropout: each process its own, whether the training was interrupted or not.
        torch.manual_seed((self.seed * 1_000_003 + step * 7919 + self.rank * 104_729) % 2**31)
        return total

    def own(self, batch: Any) -> tuple[Any, float]:
        """The part of a batch of this process, and the weight of its mean in that of all."""
        size = size_of(batch)
        start, stop = (size * rank // self.size for rank in (self.rank, self.rank + 1))
        return rows(batch, slice(start, stop), size), (stop - start) * self.size / size

    def exchange(self, loss: float) -> float:
        """Replace the gradients by those of the whole batch, unless its loss is not finite.

        Args:
            loss: The weighted loss of this process.

        Returns:
            The loss of the batch.
        """
        known = [p for p in self.network.parameters() if p.requires_grad]
        counts = torch.tensor([loss, *(p.grad is not None for p in known)], dtype=torch.float64)
        with self._watched():
            dist.all_reduce(counts)
            mean: float = counts[0].item() / self.size
            if math.isfinite(mean):
                used = [p for p, n in zip(known, counts[1:].tolist(), strict=True) if n]
                self.lore.exchange(used, [_gradient(p) for p in used])
                self.lore.step += 1
        self.idle = True
        return mean

    def wait(self) -> None:
        """After the last step, obey the leader until it dismisses this process."""
        while True:
            self._obeyed()

    def dismiss(self) -> bool:
        """Let all others stop, and return True, if they wait for an order."""
        if self.idle:
            dist.broadcast(torch.tensor([STOP, 0]), 0)
        return self.idle

    def state_dict(self) -> dict[str, Any]:
        own = self.lore.state_dict()
        self._order(STATE)
        with self._watched():
            gathered = self._gathered(own.pop("errors"))
        assert gathered is not None
        return own | {"errors": gathered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        errors = self.lore.state_dict()["errors"]
        own = state["errors"][self.rank].split([error.numel() for error in errors])
        shaped = [x.clone().reshape(e.shape) for x, e in zip(own, errors, strict=True)]
        self.lore.load_state_dict({**state, "errors": shaped})

    def _order(self, kind: int, total: int = 0) -> None:
        with self._watched():
            dist.broadcast(torch.tensor([kind, total]), 0)

    def _obeyed(self) -> int:
        """Do what the leader orders until it orders a step; its number of all steps."""
        while True:
            order = torch.zeros(2, dtype=torch.int64)
            dist.broadcast(order, 0)
            kind, total = order.tolist()
            if kind == STOP:
                raise DismissedError
            if kind == STEP:
                return int(total)
            self._gathered(self.lore.state_dict()["errors"])

    def _gathered(self, errors: Sequence[Tensor]) -> Tensor | None:
        """The errors (processes, numbers) of all processes, for the leader."""
        flat = torch.cat([torch.zeros(0), *(error.reshape(-1).cpu() for error in errors)])
        found = None if self.rank else [torch.empty_like(flat) for _ in range(self.size)]
        if len(flat):
            dist.gather(flat, found, 0)
        return None if found is None else torch.stack(found)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo, when a process has gone
            self._failed(error)
            raise


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, zeros if this process has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
