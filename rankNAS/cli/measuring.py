"""Measured latency of the dense network and of the solutions of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rankNAS.allocation import Allocation
from rankNAS.hw_models.networks import batched, built
from rankNAS.hw_models.timing import interleaved, spread_of_median, waiting
from rankNAS.hw_models.tokens import first_tokens
from rankNAS.study import Study

__all__ = ["concerns_latency", "measure"]

ROUNDS, SECONDS = 200, 5.0


def concerns_latency(study: Study) -> bool:
    """Whether a budget or an objective of the study is latency."""
    named = {name for p in study.problems for name in (*p.budget, *p.objectives)}
    return any("latency" in name for name in named)


@torch.no_grad()
def measure(
    study: Study, allocations: Sequence[Allocation], batch: int, tokens: int | None = None
) -> list[dict[str, float | int]]:
    """Interleaved end-to-end latencies of the dense and compressed networks on the search device.

    Args:
        study: The search.
        allocations: Allocations of the networks to time.
        batch: Inputs per forward pass.
        tokens: Tokens of each input; None for all.

    Returns:
        For the dense network and then each allocation: ``seconds``, the median; ``spread``, the
        standard deviation of that median; and the number of ``rounds``.
    """
    factorisation, evaluator = study.evaluator.factorisation, study.evaluator
    example = study.splits.calibration.example(batch, evaluator.device)
    inputs = first_tokens(factorisation.model, study.task.inputs_of(example), tokens)
    x = batched(inputs, batch)
    dense = factorisation.space.dense
    runs = [
        waiting(built(factorisation.model, allocation, x), torch.device(evaluator.device))
        for allocation in (dense, *allocations)
    ]
    times = interleaved(runs, rounds=ROUNDS, seconds=SECONDS, seed=study.context.seed)
    return [
        {"seconds": float(median), "spread": float(spread), "rounds": len(times)}
        for median, spread in zip(np.median(times, axis=0), spread_of_median(times), strict=True)
    ]
