"""The training of one block on fixed batches, of which the first ones judge it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankNAS.recovery.config import Refinement

__all__ = ["ROUNDING", "BlockDescent"]

logger = logging.getLogger(__name__)
HELD_OUT = 8  # one of so many batches is held out
ROUNDING = 1e-9  # of squared errors relative to the variance
WARM_UP = 0.1  # of the steps of a block
Error = Callable[[int], Tensor]  # of the number of a batch


@dataclass(frozen=True)
class BlockDescent:
    """Trains blocks by Adam; a block whose error on held-out batches does not fall is kept.

    Args:
        sizes: The samples of each batch; the first `held_out` batches are not trained on.
        config: The configuration.
        seed: The random seed.
        blocks: The number of blocks.
        on_step: Called with the steps done and the steps in all.
    """

    sizes: Sequence[int]
    config: Refinement
    seed: int
    blocks: int
    on_step: Callable[[int, int], object] | None = None

    @property
    def held_out(self) -> int:
        """The number of batches that are not trained on."""
        return held_out(len(self.sizes))

    @torch.no_grad()
    def improve(self, number: int, name: str, own: list[nn.Parameter], error: Error) -> bool:
        """Train a block; whether its error on held-out batches falls, or else it is unchanged.

        Args:
            number: The number of the block.
            name: Its name.
            own: The parameters to train.
            error: The error of the block on a batch, a scalar with gradients.
        """
        kept = [p.clone() for p in own]
        before, better = self.held_out_error(error), False
        # Rounding, or an error that is not finite in the network as it is, cannot be reduced.
        if own and ROUNDING < before < math.inf:
            diverged = not self._train(own, error, number)
            after = math.inf if diverged else self.held_out_error(error)
            better = after < before
            if diverged or not math.isfinite(after):
                logger.warning("the refinement of block %r diverged; it keeps its factors.", name)
            if not better:
                for p, value in zip(own, kept, strict=True):
                    p.copy_(value)
            logger.debug("block %s: error %.4g, refined %.4g", name, before, after)
        self.report((number + 1) * self.config.steps)
        return better

    def held_out_error(self, error: Error) -> float:
        """The mean error over the held-out samples."""
        found = [float(error(i)) * self.sizes[i] for i in range(self.held_out)]
        return sum(found) / sum(self.sizes[: self.held_out])

    def report(self, done: int) -> None:
        """Report the steps that are done."""
        if self.on_step is not None:
            self.on_step(done, self.config.steps * self.blocks)

    def _train(self, own: list[nn.Parameter], error: Error, number: int) -> bool:
        """Train parameters on the batches that are not held out; False if the loss diverges."""
        steps, peak = self.config.steps, self.config.learning_rate
        adam = torch.optim.Adam(own, lr=peak)
        order = _order(len(self.sizes), self.held_out, self.seed * 1_000_003 + number)
        for p in own:
            p.requires_grad_(True)
        try:
            for step, i in zip(range(steps), order, strict=False):
                adam.param_groups[0]["lr"] = _learning_rate(step, steps, peak)
                with torch.enable_grad():
                    loss = error(i)
                    if not math.isfinite(loss.item()):
                        return False
                    if not loss.requires_grad:  # a divergence of the user without gradients
                        return True
                    adam.zero_grad()
                    loss.backward()
                adam.step()
                self.report(number * steps + step + 1)
        finally:
            for p in own:
                p.requires_grad_(False)
                p.grad = None
        return True


def held_out(batches: int) -> int:
    """How many of a number of batches are held out."""
    return max(1, batches // HELD_OUT)


def _order(count: int, first: int, seed: int) -> Iterator[int]:
    """Numbers of batches from `first` on, in a new order for each pass over them; endless."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (first + torch.randperm(count - first, generator=generator)).tolist()


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine that would be 0 after the last step."""
    warm_up = max(1, round(WARM_UP * steps))
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return peak * min(1.0, (step + 1) / warm_up) * cosine
