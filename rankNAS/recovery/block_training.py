"""The training of a compressed network's blocks, from first to last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import evaluating
from rankNAS.exceptions import WeightsError, WriteError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.recovery.block_descent import ROUNDING, BlockDescent
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
SMALL = 64 << 20  # bytes of a finished checkpoint that is kept
VERSION = 1  # of the checkpoints; increment it when the result of a refinement changes


@dataclass(frozen=True)
class BlockTraining:
    """A refinement in progress.

    Args:
        dense: The blocks of the dense network.
        compressed: The blocks of the compressed one.
        batches: Inputs on the device; the first ones are held out.
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

    @torch.no_grad()
    def _walk(self, done: int, checkpoint: Path | None) -> None:
        """Advance both networks block by block, and train the blocks from number `done` on."""
        total, held_out = len(self.compressed.names), self._descent.held_out
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

        def error(i: int) -> Tensor:
            output = self.compressed.run(number, states[i], self.batches[i])
            return loss(output, targets[i], i)

        own = [p for p in self.compressed.parameters(number) if id(p) in self.trainable]
        self._descent.improve(number, self.compressed.names[number], own, error)

    @property
    def _descent(self) -> BlockDescent:
        total = len(self.compressed.names)
        return BlockDescent(self.batches.sizes, self.config, self.seed, total, self.on_step)

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
            return self._descent.held_out_error(error)

    def _output(self, model: nn.Module, i: int) -> Any:
        with self.task.compact(model):
            return self.batches[i].run(model)

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
