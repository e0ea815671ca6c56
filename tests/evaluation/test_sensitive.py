"""The most sensitive validation samples, and their own metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from searches import linear_search
from torch import nn

from rankNAS.evaluation.sensitive import most_sensitive
from rankNAS.strategies.history import History
from rankNAS.strategies.sampling.random import Random


def test_the_samples_whose_loss_varies_most_come_first_and_are_measured_apart() -> None:
    study = linear_search()
    evaluator, problem = study.evaluator, study.problem
    allocations = Random().propose(problem, History(), 4, np.random.default_rng(1))
    x, y = (torch.cat(t) for t in zip(*evaluator.validation.batches(7), strict=True))
    networks = [evaluator.factorisation.materialise(a) for a in allocations]
    with torch.no_grad():
        outputs = [n(x) for n in networks]
    losses = torch.stack([nn.functional.cross_entropy(o, y, reduction="none") for o in outputs])
    order = most_sensitive(evaluator, allocations)
    assert order is not None and sorted(order.tolist()) == list(range(len(y)))
    deviation = losses.std(0)
    assert deviation[order].tolist() == pytest.approx(
        deviation.sort(descending=True).values.tolist(), abs=1e-5
    )
    few = evaluator.focused(order, 5)
    for i, allocation in enumerate(allocations):
        found, plain = few.evaluate(allocation), evaluator.evaluate(allocation)
        assert found["loss@sensitive"] == pytest.approx(
            float(losses[i, order[:5]].mean()), abs=1e-5
        )
        for name, value in plain.items():
            assert found[name] == pytest.approx(value, abs=1e-5)
        assert "reverse_kl@sensitive" in found and "loss@sensitive" not in plain
    assert most_sensitive(evaluator, allocations[:1]) is None
