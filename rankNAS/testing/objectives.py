"""Contract tests of objectives, as a test class. Needs pytest."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.objectives.base import EvaluationResult, ObjectiveBase

__all__ = ["ObjectiveContract"]


class ObjectiveContract:
    """Contract of an objective, tested on a small classifier.

    Set `objective`. For noisy measurements also set `noise`, the largest relative difference
    between two measurements of one candidate. Override `candidate` for other tasks.
    """

    objective: ClassVar[ObjectiveBase]
    noise: ClassVar[float] = 0.0

    def candidate(self) -> EvaluationResult:
        """A candidate to measure, identical on each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense, network = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4))
            inputs, targets = torch.randn(9, 6), torch.randint(4, (9,))
        with torch.no_grad():
            logits, dense_logits = network.eval()(inputs), dense(inputs)
        allocation = Allocation.of({"layer": Choice("svd", (2,))})
        costs = {"macs": 20.0, "params": 26.0, "weight_bytes": 104.0}
        return EvaluationResult(
            allocation, logits, dense_logits, targets, inputs, costs, lambda: network
        )

    def test_has_a_name_and_a_direction(self) -> None:
        assert isinstance(self.objective.name, str) and self.objective.name
        assert self.objective.direction in ("maximize", "minimize")

    def test_measures_a_finite_number(self) -> None:
        value = self.objective(self.candidate())
        assert type(value) is float and math.isfinite(value)

    def test_equal_candidates_give_equal_values(self) -> None:
        candidate = self.candidate()
        first = self.objective(candidate)
        for other in (candidate, self.candidate()):
            assert self.objective(other) == pytest.approx(first, rel=self.noise, abs=0)

    def test_the_candidate_is_left_alone(self) -> None:
        def tensors(candidate: EvaluationResult) -> list[Tensor]:
            own = [candidate.logits, candidate.dense_logits, candidate.targets, candidate.inputs]
            return [*own, *candidate.build().state_dict().values()]

        candidate, untouched = self.candidate(), self.candidate()
        self.objective(candidate)
        assert candidate.costs == untouched.costs
        assert candidate.allocation == untouched.allocation
        assert not candidate.build().training
        pairs = zip(tensors(candidate), tensors(untouched), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
