"""Contract tests of objectives, as a test class. Needs pytest."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.data.samples import Samples
from rankNAS.objectives.base import EvaluationResult, ObjectiveBase
from rankNAS.tasks.classification import Classification
from rankNAS.trees import tensors

__all__ = ["ObjectiveContract"]


class ObjectiveContract:
    """Contract of an objective, tested on a small network.

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
            batch = torch.randn(9, 6), torch.randint(4, (9,))
        task = Classification().bound(batch, dense)
        with torch.no_grad():
            sums = task.run(network.eval(), batch).sums(task.run(dense, batch))
        allocation = Allocation.of({"layer": Choice("svd", (2,))})
        costs = {"macs": 20.0, "params": 26.0, "weight_bytes": 104.0}
        costs |= {"layer_macs": 20.0, "layer_params": 26.0}
        samples = Samples.of(batch)
        return EvaluationResult(
            allocation, task.finish(sums), costs, task, samples, lambda: network
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
        def content(candidate: EvaluationResult) -> list[Tensor]:
            weights = candidate.build().state_dict().values()
            return [*tensors(candidate.data()), *weights]

        candidate, untouched = self.candidate(), self.candidate()
        self.objective(candidate)
        assert candidate.costs == untouched.costs
        assert candidate.metrics == untouched.metrics
        assert candidate.allocation == untouched.allocation
        assert not candidate.build().training
        pairs = zip(content(candidate), content(untouched), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
