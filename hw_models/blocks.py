"""Combination of block timings: stage times with the effects of the blocks removed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rankNAS.decompositions import LayerShape
from rankNAS.hw_models.profiles import Measurement
from rankNAS.hw_models.timing import effects_of_blocks

__all__ = ["combined"]

logger = logging.getLogger(__name__)
DISTURBED = 1.5  # slowdown that marks a block as disturbed by another process


def combined(blocks: Sequence[Mapping[LayerShape, Measurement]]) -> dict[LayerShape, Measurement]:
    """Stage times and standard deviations, combined from several blocks.

    Disturbed blocks are dropped for stages with an undisturbed one.
    """
    places = {shape: i for i, shape in enumerate({s: None for block in blocks for s in block})}
    found = [m for block in blocks for m in block.values()]
    items = np.array([places[shape] for block in blocks for shape in block])
    numbers = np.array([k for k, block in enumerate(blocks) for _ in block])
    values = np.log([m.seconds for m in found])
    effects = effects_of_blocks(items, numbers, values)
    values -= effects[numbers]
    quiet = effects[numbers] < math.log(DISTURBED)
    used = quiet | (np.bincount(items, quiet)[items] == 0)
    if not used.all():
        logger.info("something else was running during %d timings of stages", (~used).sum())
    counts = np.bincount(items, used)
    means = np.bincount(items, values * used) / counts
    # Deviation of one timing: between blocks, or within a block if that is larger.
    apart = (np.abs(values - means[items]))[used & (counts[items] > 1)]
    single = 1.4826 * float(np.median(apart)) * math.sqrt(2) if len(apart) else 0.0
    within = np.array([m.sigma / m.seconds for m in found])
    within = np.sqrt(np.bincount(items, used * within**2)) / counts
    deviations = np.maximum(within, single / np.sqrt(counts))
    rounds = np.bincount(items, [m.rounds for m in found])
    return {
        shape: Measurement(
            float(np.exp(means[i])), float(np.exp(means[i]) * deviations[i]), int(rounds[i])
        )
        for shape, i in places.items()
    }
