"""Block-wise refinement: the blocks of a compressed network learn the outputs of the dense ones.

Block after block, the factors minimise the squared error of the block's output against that of the
dense block, weighted by the second moment of the loss's gradients there (see `ChannelLoss`). The
inputs of a block come from the compressed blocks before it, its targets from the dense network.
The last block minimises the divergence of the network's output. No label is read. Some batches are
held out: a block whose error on them does not fall keeps its factors, and so does a network whose
divergence does not fall.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.surgery import shared_copy
from rankNAS.copies import copied
from rankNAS.data.samples import Samples, permutation
from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import fingerprint
from rankNAS.recovery.block_training import VERSION, BlockTraining
from rankNAS.recovery.blocks import Blocks, JoinedBlocks
from rankNAS.recovery.config import Refinement
from rankNAS.recovery.splitting import paired_blocks
from rankNAS.recovery.streamed_refinement import refine_streamed
from rankNAS.tasks.base import HALF, Task, at_least_float32
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import (
    Inputs,
    channels_last,
    count_bytes,
    has_images,
    named_tensors,
    sample_count,
    tensors,
    tree_map,
)

__all__ = ["MEMORY", "Refiner", "refine"]

logger = logging.getLogger(__name__)
MEMORY = 2 << 30  # bytes of the inputs of a block in both networks; beyond it, fewer samples
STEP_MEMORY = 64 << 20  # bytes of the inputs of a block in one step


def refine(
    network: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, Sequence[str]],
    data: Samples,
    task: Task,
    config: Refinement,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], object] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Refine a compressed network in place, block by block.

    Half-precision networks are refined in single precision and rounded at the end.

    Args:
        network: The compressed network, on ``device``. It ends in evaluation mode.
        dense: The dense network; unchanged.
        layers: Per layer of the space, all of its paths in both networks.
        data: Samples to draw from; their labels are not read.
        task: Reads batches and outputs.
        config: The configuration.
        seed: Random seed of the samples and of their order.
        device: The device to train on.
        on_step: Called with the steps done and the steps in all.
        checkpoint: Written after each block; a refinement resumes from it if it exists.

    Returns:
        The same ``network``. It is unchanged if the refinement did not help on held-out samples.
    """
    network.eval()
    images = has_images(task.inputs_of(data.example()))
    teacher, student = (
        _prepared(m, device, images) for m in (shared_copy(dense), copied(network))
    )
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    for model in (teacher, student):
        model.requires_grad_(False)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        work = _work(teacher, student, layers, data, task, config, seed, device)
        if work is None:
            return network
        run = BlockTraining(*work, task, config, seed, trainable, student, on_step)
        helped = run.all_blocks(checkpoint, teacher)
    if helped:
        network.load_state_dict(student.state_dict())
    return network


@dataclass(frozen=True)
class Refiner:
    """A refinement that is identical for every network of a study.

    Args:
        data: Training samples to draw from; their labels are not read.
        task: Reads batches and outputs.
        config: The configuration.
        seed: The seed of the study.
        report: Called with the stage ``refine``, the steps done and the steps in all.
    """

    data: Samples
    task: Task
    config: Refinement
    seed: int
    report: Callable[[str, int, int], object]

    def refine(
        self, network: nn.Module, factorisation: Factorisation, device: torch.device | str
    ) -> nn.Module:
        """Refine a network of a factorisation in place; see `refine`.

        An interrupted refinement of the same network with the same data continues.
        """
        return refine(
            network,
            factorisation.model,
            {name: layer.paths for name, layer in factorisation.space.layers.items()},
            self.data,
            self.task,
            self.config,
            seed=self.seed,
            device=device,
            on_step=lambda done, total: self.report("refine", done, total),
            checkpoint=self._checkpoint(network, factorisation.model),
        )

    def refine_streamed(
        self,
        network: nn.Module,
        refit: BlockRefit,
        allocation: Allocation,
        device: torch.device | str,
        *,
        fit: bool,
    ) -> nn.Module:
        """The refined network of an allocation, whose blocks are in memory one at a time.

        See `rankNAS.recovery.streamed_refinement.refine_streamed`.
        """
        return refine_streamed(
            network,
            refit,
            allocation,
            self.data,
            self.task,
            self.config,
            fit=fit,
            seed=self.seed,
            device=device,
            on_step=lambda done, total: self.report("refine", done, total),
        )

    def _checkpoint(self, network: nn.Module, dense: nn.Module) -> Path:
        """A path that is equal for equal networks, configurations and first samples."""
        tensors = {f"dense {name}": x for name, x in dense.state_dict().items()}
        tensors |= network.state_dict()
        tensors |= {f"data {name}": x for name, x in named_tensors(self.data.example(16))}
        key = fingerprint(tensors, f"{self.seed} {self.config} {len(self.data)} {VERSION}")
        return cache_folder() / "checkpoints" / f"refine-{key}.pt"


def _work(
    teacher: nn.Module,
    student: nn.Module,
    layers: Mapping[str, Sequence[str]],
    data: Samples,
    task: Task,
    config: Refinement,
    seed: int,
    device: torch.device | str,
) -> tuple[Blocks, Blocks, InputBatches] | None:
    """The blocks and the batches; None, with a warning, if the network cannot be refined."""
    count = min(config.samples, len(data))
    if count < 2:
        logger.warning("the network is not refined: two samples are needed, and there is one.")
        return None
    data = data.take(permutation(len(data), seed)[:count])
    few = task.inputs_of(_placed(data.example(2, device)))
    try:
        found = paired_blocks(teacher, student, layers, few)
    except Exception as error:  # the network does not run in single precision, for example
        logger.warning("the network is not refined: %s: %s", type(error).__name__, error)
        return None
    if found is None:
        logger.warning("the network is not refined: none of its blocks can be run by itself.")
        return None
    dense, compressed = (JoinedBlocks(blocks, config.blocks) for blocks in found)
    each = _bytes_per_sample(dense, few)
    size = max(1, min(config.batch_size, count // 2, STEP_MEMORY // each))
    most = max(2 * size, MEMORY // (2 * each))
    if most < count:
        logger.info("%d of %d samples fit into the memory of a refinement", most, count)
        data = data.take(torch.arange(most))
    batches = data.batched(size, device=device, place=_placed)
    return dense, compressed, InputBatches(batches, task)


@torch.no_grad()
def _bytes_per_sample(blocks: Blocks, few: Inputs) -> int:
    """The most bytes that the state before a block takes for one sample."""
    state = blocks.first(few)
    most = count_bytes(tensors(few))
    for number in range(len(blocks.names) - 1):
        _, state = blocks.advance(number, state, few)
        most = max(most, count_bytes(list(state.values()) if isinstance(state, dict) else state))
    return max(1, most // (sample_count(few) or 1))


def _prepared(model: nn.Module, device: torch.device | str, images: bool) -> nn.Module:
    """A copy of a network in evaluation mode and single precision, on the device."""
    model = model.to(device).eval()
    if any(x.dtype in HALF for x in (*model.parameters(), *model.buffers())):
        model = model.float()
    return model.to(memory_format=torch.channels_last) if images else model


def _placed(batch: Any) -> Any:
    """A batch in single precision and channels-last memory format."""
    return channels_last(tree_map(at_least_float32, batch))
