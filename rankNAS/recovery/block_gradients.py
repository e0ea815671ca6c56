"""Second moments of the loss's gradients at the outputs of blocks, one block at a time.

A backward pass over a whole network keeps all of its activations. Here the outputs of the blocks
are kept, perhaps in files, and each block runs again with a graph, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.blocks import BlockChain, freed, graded, leaf
from rankNAS.recovery.block_losses import channel_moment
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches
from rankNAS.tasks.headed import output_head
from rankNAS.trees import floating_tensors, tree_map

__all__ = ["chain_gradients"]


@torch.no_grad()
def chain_gradients(
    chain: BlockChain,
    batches: InputBatches,
    numbers: Sequence[int],
    task: Task,
    cache: ActivationCache,
    seed: int = 0,
) -> list[Tensor | None]:
    """The second moments of the gradients at the outputs of the blocks; see `output_gradients`.

    Args:
        chain: The blocks of the dense network.
        batches: Inputs.
        numbers: The batches to use.
        task: Reads batches and outputs.
        cache: Keeps what lies between two blocks.
        seed: Random seed of the sampled targets.

    Returns:
        For each block a moment (c, c) or its diagonal (c,), float64; None if the loss has no
        gradients there.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(chain)
    if chain.blocks[-1] is output_head(chain.network):  # its outputs are large
        count -= 1
    shapes: dict[int, list[Any]] = {i: [] for i in numbers}

    def before(number: int, i: int) -> list[Any]:
        return [*shapes[i][: number - 1], cache.get((number - 1, i))] if number else []

    for number in range(count):
        for i in numbers:
            output = chain.run(number, batches[i], before(number, i))
            cache.put((number, i), output)
            shapes[i].append(tree_map(freed, output))
    sums: list[Tensor | None] = [None] * len(chain)
    for number in range(count, 0, -1):  # from the last block to the end of the network first
        for i in numbers:
            given = before(number, i)
            given[-1] = tree_map(leaf, given[-1])
            starts = floating_tensors(given[-1])
            end = number == count
            with torch.enable_grad(), task.compact(chain.network) if end else nullcontext():
                output = chain.run(number, batches[i], given, whole=end)
            with torch.enable_grad():
                known: Sequence[Tensor | None] = [None]
                if end:
                    prediction = task.predict(output, batches.batch(i))
                    ends = [prediction.sampled_loss(generator)]
                else:
                    ends, known = graded(output, cache.get(("g", i)))
                if not ends or not ends[0].requires_grad:
                    return sums
                found = torch.autograd.grad(ends, starts, known, materialize_grads=True)
            cache.drop((number - 1, i))
            cache.put(("g", i), list(found))
            own, total = channel_moment(found[0]), sums[number - 1]
            sums[number - 1] = own if total is None else total + own
    return [x if x is not None and bool(x.isfinite().all()) else None for x in sums]
