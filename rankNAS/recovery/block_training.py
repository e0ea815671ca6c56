"""The training of a compressed network's blocks, from first to last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import evaluating
from rankNAS.exceptions import WeightsError, WriteError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.recovery.block_losses import (
    ChannelLoss,
    DenseOutputs,
    Loss,
    Targets,
    advanced,
    output_gradients,
)
from rankNAS.recovery.blocks import Blocks
from rankNAS.recovery.config import Refinement
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import count_bytes

__all__ = ["BlockTraining", "VERSION"]

logger = logging.getLogger(__name__)
GRADIENTS = 512  # samples for the gradients at the outputs of blocks
HELD_OUT = 8  # one of so many batches is held out
ROUNDING = 1e-9  # of squared errors relative to the variance
WARM_UP = 0.1  # of the steps of a block
SMALL = 64 << 20  # bytes of a finished checkpoint that is kept
VERSION = 1  # of the checkpoints; increment it when the result of a refinement changes


@dataclass(frozen=True)
class BlockTraining:
    """A refinement in progress.

    Args:
        dense: The blocks of the dense network.
        compressed: The blocks of the compressed one.
        batches: Inputs on the device; the first `held_out` batches are not trained on.
        task: Reads batches and outputs.
        config: The configuration.
        seed: The random seed.
        trainable: Identities of the parameters that are not frozen.
        network: The compressed network, in single precision.
        on_step: Called with the steps done and the steps in all.
    """

    dense: Blocks
    compressed: Blocks
    batches: InputBatches
    task: Task
    config: Refinement
    seed: int
    trainable: set[int]
    network: nn.Module
    on_step: Callable[[int, int], object] | None

    def all_blocks(self, checkpoint: Path | None, teacher: nn.Module) -> bool:
        """Train all blocks that a checkpoint has not done; whether the network is better then."""
        total = len(self.compressed.names)
        before = self._divergence(teacher)
        done = self._load(checkpoint)
        if done < total:
            self._walk(done, checkpoint)
        after = self._divergence(teacher)
        logger.info("refinement: divergence %.5g before, %.5g after, held out", before, after)
        if before > ROUNDING and not after < before:
            logger.warning("the refinement is not kept: it does not help on held-out samples.")
        return after < before

    @property
    def held_out(self) -> int:
        """The number of batches that are not trained on."""
        return max(1, len(self.batches) // HELD_OUT)

    @torch.no_grad()
    def _walk(self, done: int, checkpoint: Path | None) -> None:
        """Advance both networks block by block, and train the blocks from number `done` on."""
        total, held_out = len(self.compressed.names), self.held_out
        some = range(held_out, len(self.batches))[: math.ceil(GRADIENTS / self.batches.sizes[0])]
        gradients = output_gradients(self.dense, self.batches, some, self.task, self.seed)
        dense = [self.dense.first(x) for x in self.batches]
        compressed = [self.compressed.first(x) for x in self.batches]
        for number in range(total):
            if self.compressed.ends_network and number + 1 == total:
                targets: Targets = DenseOutputs(self.dense, number, dense, self.batches)
                loss: Loss = self._divergence_of_batch
            else:
                targets = advanced(self.dense, number, dense, self.batches)
                loss = ChannelLoss(targets[held_out:], gradients[number], self.batches)
            if number >= done:
                self._block(number, compressed, targets, loss)
                self._save(checkpoint, number + 1)
            if number + 1 < total:
                advanced(self.compressed, number, compressed, self.batches)

    def _block(self, number: int, states: Sequence[Any], targets: Targets, loss: Loss) -> None:
        """Train one block; its weights change only if its error on held-out batches falls."""
        name, steps = self.compressed.names[number], self.config.steps
        own = [p for p in self.compressed.parameters(number) if id(p) in self.trainable]
        kept = [p.clone() for p in own]

        def error(i: int) -> Tensor:
            output = self.compressed.run(number, states[i], self.batches[i])
            return loss(output, targets[i], i)

        before = self._held_out_error(error)
        # Rounding, or an error that is not finite in the network as it is, cannot be reduced.
        if own and ROUNDING < before < math.inf:
            diverged = not self._train(own, error, number)
            after = math.inf if diverged else self._held_out_error(error)
            if diverged or not math.isfinite(after):
                logger.warning("the refinement of block %r diverged; it keeps its factors.", name)
            if not after < before:
                for p, value in zip(own, kept, strict=True):
                    p.copy_(value)
            logger.debug("block %s: error %.4g, refined %.4g", name, before, after)
        self._report((number + 1) * steps)

    def _train(self, own: list[nn.Parameter], error: Callable[[int], Tensor], number: int) -> bool:
        """Train parameters on the batches that are not held out; False if the loss diverges."""
        steps, peak = self.config.steps, self.config.learning_rate
        adam = torch.optim.Adam(own, lr=peak)
        order = _order(len(self.batches), self.held_out, self.seed * 1_000_003 + number)
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
                self._report(number * steps + step + 1)
        finally:
            for p in own:
                p.requires_grad_(False)
                p.grad = None
        return True

    def _held_out_error(self, error: Callable[[int], Tensor]) -> float:
        found = [float(error(i)) * self.batches.sizes[i] for i in range(self.held_out)]
        return sum(found) / sum(self.batches.sizes[: self.held_out])

    def _divergence_of_batch(self, output: Any, target: Any, number: int) -> Tensor:
        batch = self.batches.batch(number)
        found, expected = (self.task.predict(x, batch) for x in (output, target))
        return found.distillation(expected)

    @torch.no_grad()
    def _divergence(self, teacher: nn.Module) -> float:
        """The divergence of the whole network from the dense one on the held-out batches."""

        def error(i: int) -> Tensor:
            output, target = (self._output(model, i) for model in (self.network, teacher))
            return self._divergence_of_batch(output, target, i)

        with evaluating(self.network), evaluating(teacher):
            return self._held_out_error(error)

    def _output(self, model: nn.Module, i: int) -> Any:
        with self.task.compact(model):
            return self.batches[i].run(model)

    def _report(self, done: int) -> None:
        if self.on_step is not None:
            self.on_step(done, self.config.steps * len(self.compressed.names))

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(x.shape) for name, x in self.network.state_dict().items()}
        count = self.batches.samples
        own = {"seed": self.seed, "samples": count, "shapes": shapes, "version": VERSION}
        return {**asdict(self.config), **own}

    def _load(self, checkpoint: Path | None) -> int:
        """The number of blocks that a checkpoint has done; the network has its weights then."""
        if checkpoint is None or not checkpoint.is_file():
            return 0
        try:
            content = read_checkpoint(checkpoint, self._identity())
        except WeightsError as error:
            logger.warning("the refinement begins anew: %s", error)
            return 0
        self.network.load_state_dict(content["model"])
        done: int = content["blocks"]
        return done

    def _save(self, checkpoint: Path | None, done: int) -> None:
        """Write the weights after a block. A finished checkpoint stays only if it is small."""
        if checkpoint is None:
            return
        model = self.network.state_dict()
        if done == len(self.compressed.names) and count_bytes(model) > SMALL:
            checkpoint.unlink(missing_ok=True)
            return
        try:
            content = {"model": model, "blocks": done, "identity": self._identity()}
            write_checkpoint(checkpoint, content)
        except WriteError as error:
            logger.warning("the refinement could not be stored: %s", error)


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
