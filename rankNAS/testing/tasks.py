"""Contract tests of tasks, as a test class. Needs pytest."""

from __future__ import annotations

import copy
import pickle
from abc import abstractmethod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Prediction, Sums, Task, added
from rankNAS.trees import count_bytes, rows, size_of, tensors

__all__ = ["TaskContract"]


class TaskContract:
    """Contract of a task.

    Set `task`, and override `model` and `batch`. The outputs of the model must depend on each of
    its samples alone.
    """

    task: ClassVar[Task]

    @abstractmethod
    def model(self) -> nn.Module:
        """A model for the task, in evaluation mode; equal weights on each call."""

    @abstractmethod
    def batch(self) -> Any:
        """At least four samples, identical on each call."""

    @pytest.fixture
    def network(self) -> nn.Module:
        """The model."""
        return self.model()

    @pytest.fixture
    def bound(self, network: nn.Module) -> Task:
        """The task with its layout."""
        return self.task.bound(self.batch(), network)

    @pytest.fixture
    def prediction(self, bound: Task, network: nn.Module) -> Prediction:
        """The model's prediction for the batch, with gradients."""
        return bound.run(network, self.batch())

    def other(self) -> nn.Module:
        """Another network: the model with noise on its weights."""
        network = copy.deepcopy(self.model())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.5 * noise.to(parameter))
        return network

    def test_has_a_name_and_metrics_with_directions(self) -> None:
        assert isinstance(self.task.name, str) and self.task.name
        assert self.task.directions
        assert set(self.task.directions.values()) <= {"maximize", "minimize"}
        assert self.task.describe()

    def test_the_layout_of_a_batch_binds(self, bound: Task, network: nn.Module) -> None:
        batch = self.batch()
        assert bound.bound(batch, network) == bound
        assert size_of(bound.inputs_of(batch)) == size_of(batch)
        output = bound.inputs_of(batch).run(network)
        bound.check(Samples.of(iter([batch])), "train", output)

    def test_all_predictions_of_a_batch_count_once(self, bound: Task, network: nn.Module) -> None:
        whole = len(bound.run(network, self.batch()))
        assert 0 < whole == sum(len(bound.run(network, half)) for half in self._halves())

    def test_the_loss_is_a_finite_number_with_gradients(
        self, prediction: Prediction, network: nn.Module
    ) -> None:
        if "loss" not in self.task.directions:
            with pytest.raises(DataError):
                prediction.loss()
            return
        loss = prediction.loss()
        assert loss.dim() == 0 and bool(loss.isfinite())
        assert _has_gradients(loss, network)

    def test_the_sampled_loss_has_gradients(
        self, prediction: Prediction, network: nn.Module
    ) -> None:
        loss = prediction.sampled_loss(torch.Generator().manual_seed(0))
        assert loss.dim() == 0 and bool(loss.isfinite())
        assert _has_gradients(loss, network)

    def test_the_sampled_loss_depends_on_its_generator_alone(self, prediction: Prediction) -> None:
        first = prediction.sampled_loss(torch.Generator().manual_seed(3))
        torch.rand(2)
        state = torch.random.get_rng_state()
        again = prediction.sampled_loss(torch.Generator().manual_seed(3))
        assert torch.equal(first, again)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_the_divergence_from_a_teacher_trains(
        self, bound: Task, prediction: Prediction
    ) -> None:
        other = self.other()
        loss = bound.run(other, self.batch()).distillation(prediction)
        assert loss.dim() == 0 and float(loss.detach()) > 0
        assert _has_gradients(loss, other)

    def test_the_sums_of_parts_add_up(self, bound: Task) -> None:
        whole = bound.finish(self._sums(bound, self.batch()))
        total: Sums = {}
        for half in self._halves():
            total = added(total, self._sums(bound, half))
        assert bound.finish(total) == pytest.approx(whole, rel=1e-9, abs=1e-9)

    def test_sums_are_float64_and_need_no_gradients(
        self, bound: Task, prediction: Prediction
    ) -> None:
        for value in prediction.sums(prediction).values():
            assert value.dtype == torch.float64 and not value.requires_grad

    def test_the_metrics_are_those_that_the_task_names(self, bound: Task) -> None:
        sums = self._sums(bound, self.batch())
        assert set(bound.finish(sums)) == set(bound.directions)
        assert bound.divergence_name in bound.directions

    def test_the_divergence_of_a_prediction_from_itself_is_zero(
        self, bound: Task, prediction: Prediction
    ) -> None:
        name = bound.divergence_name
        assert bound.directions[name] == "minimize"
        assert bound.finish(prediction.sums(prediction))[name] == pytest.approx(0, abs=1e-7)
        assert bound.finish(self._sums(bound, self.batch()))[name] > 1e-7

    def test_references_need_no_more_memory_than_allowed(
        self, bound: Task, prediction: Prediction
    ) -> None:
        assert prediction.nbytes > 0
        for allowed in (0, prediction.nbytes // 3, prediction.nbytes - 1, prediction.nbytes):
            kept = prediction.kept(allowed)
            assert kept is None or kept.nbytes <= allowed
        whole = prediction.kept(prediction.nbytes)
        assert whole is not None
        other = bound.run(self.other(), self.batch())
        expected = bound.finish(other.sums(prediction))
        assert bound.finish(other.sums(whole)) == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_references_keep_no_graph(self, prediction: Prediction) -> None:
        kept = prediction.kept(prediction.nbytes)
        assert kept is not None
        assert not any(x.requires_grad for x in tensors(list(vars(kept).values())))

    def test_the_sums_do_not_grow_with_the_batch(self, bound: Task) -> None:
        sizes = [count_bytes(self._sums(bound, batch)) for batch in (self.batch(), self._half())]
        assert sizes[0] == sizes[1]

    def test_pickles(self, bound: Task, prediction: Prediction) -> None:
        again: Task = pickle.loads(pickle.dumps(bound))
        assert again == bound and again.identity == bound.identity
        expected = self._sums(bound, self.batch())
        found = self._sums(again, self.batch())
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def _sums(self, task: Task, batch: Any) -> Sums:
        """The sums of the other network with the model as its reference."""
        return task.run(self.other(), batch).sums(task.run(self.model(), batch))

    def _half(self) -> Any:
        return self._halves()[0]

    def _halves(self) -> tuple[Any, Any]:
        batch = self.batch()
        size = size_of(batch)
        middle = size // 2
        return rows(batch, slice(0, middle), size), rows(batch, slice(middle, size), size)


def _has_gradients(loss: Tensor, network: nn.Module) -> bool:
    """Whether the gradients are finite and one of them is not 0."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    given = [g for g in found if g is not None]
    return bool(given) and all(bool(g.isfinite().all()) for g in given) and any(map(_any, given))


def _any(gradient: Tensor) -> bool:
    return bool((gradient != 0).any())
