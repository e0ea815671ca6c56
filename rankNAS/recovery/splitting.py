"""The split of a dense network and of its compressed one into corresponding blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.recovery.blocks import Blocks
from rankNAS.recovery.module_blocks import ModuleBlocks, repeated_modules, usable_modules
from rankNAS.recovery.traced_blocks import TracedBlocks, have_equal_operations, spans
from rankNAS.trees import Inputs

__all__ = ["paired_blocks"]


@torch.no_grad()
def paired_blocks(
    dense: nn.Module,
    compressed: nn.Module,
    layers: Mapping[str, Sequence[str]],
    few: Inputs,
) -> tuple[Blocks, Blocks] | None:
    """The corresponding blocks of a dense network and of its compressed one.

    Args:
        dense: The dense network, in evaluation mode. In-place activations become out-of-place.
        compressed: The compressed network, likewise.
        layers: Per layer of the space, all of its paths in both networks.
        few: Inputs of a few samples.

    Returns:
        The blocks of both networks; None if there is no block.
    """
    traced = [IncrementalExecutor.of(model, layers, [few]) for model in (dense, compressed)]
    paths = {path for found in layers.values() for path in found}
    names = repeated_modules(dense, paths)
    if (
        traced[0] is not None
        and traced[1] is not None
        and have_equal_operations(traced[0], traced[1])
    ):
        found = spans(traced[0], paths, few)
        if len(found) > 1 or paths.issuperset(names):
            return TracedBlocks(traced[0], found), TracedBlocks(traced[1], found)
    calls, links = usable_modules(dense, names, few)
    if not calls:
        return None
    return ModuleBlocks(dense, calls, links), ModuleBlocks(compressed, calls, links)
