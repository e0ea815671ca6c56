"""Models that change their inputs in place give the results of out-of-place twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.compression.batch_norm import reestimate_batch_norm
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.compression.reconstruction import refit_sequentially
from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
from rankNAS.objectives import Objective
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import train
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks.infer import infer_task, resolve_task

Change = Callable[[Tensor], Tensor]


def in_place(x: Tensor) -> Tensor:
    x.sub_(0.5).mul_(2)
    return x


def out_of_place(x: Tensor) -> Tensor:
    return (x - 0.5) * 2


class Net(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.body = nn.Sequential(
            nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.change(x)))


def samples(count: int = 160) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 32, generator=generator), torch.arange(count) % 4


@pytest.mark.parametrize("recovery", [None, TrainingConfig(epochs=1)])
def test_a_search_gives_the_results_of_the_twin(recovery: TrainingConfig | None) -> None:
    found = []
    for change in (in_place, out_of_place):
        x, y = samples()
        kept = x.clone()
        study = rankNAS.search(
            Net(change).eval(),
            (TensorDataset(x[:120], y[:120]), TensorDataset(x[120:], y[120:])),
            budget={"macs": 0.5},
            strategy="solve",
            n_trials=2,
            settings=rankNAS.Settings(calibration=48, validation=48, recovery=recovery),
        )
        assert torch.equal(x, kept)
        network = study.materialise()
        metrics = [t.metrics for t in study.trials]
        found.append((study.dense, metrics, study.test(network), network(out_of_place(x) / 3)))
    for a, b in zip(*found, strict=True):
        if isinstance(a, Tensor):
            assert torch.allclose(a, b, atol=1e-4)
        else:
            assert a == pytest.approx(b, rel=1e-4)


def test_the_first_pass_finds_out() -> None:
    x, y = samples()
    data = load_data((TensorDataset(x, y), TensorDataset(x, y)))
    kept = x.clone()
    for change, changes in ((in_place, True), (out_of_place, False)):
        model = Net(change).eval()
        assert resolve_task(None, model, data).changes_inputs is changes
        assert resolve_task("classification", model, data).changes_inputs is changes
        assert infer_task(model, (x, y)).changes_inputs is changes
        assert torch.equal(x, kept)
    plain, changing = (resolve_task(None, Net(c).eval(), data) for c in (out_of_place, in_place))
    assert plain.identity == changing.identity


class Masking(nn.Module):
    """Changes a list of its input, and a dict; both hold new tensors after a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, given: dict[str, Tensor]) -> Any:
        given["x"] = given["x"] + 1
        return self.head(given["x"])


def test_containers_that_change_are_noticed() -> None:
    x, y = samples()
    batch = ({"x": x}, y)
    task = infer_task(Masking(), batch)
    assert task.changes_inputs and batch[0]["x"] is x
    assert task.inputs_of(batch).args[0]["x"] is not x


@pytest.mark.parametrize("source", ["tensor", "samples"])
def test_every_stage_alone_leaves_its_inputs_as_they_are(source: str) -> None:
    results = []
    for change in (in_place, out_of_place):
        x, y = samples()
        kept = x.clone()
        model = Net(change).eval()
        space = compile_space(model, x[:1])
        task = infer_task(model, (x, y))
        given: Any = x if source == "tensor" else Samples.of((x, y))
        of_task = None if source == "tensor" else task
        statistics = calibrate(model, space, given, of_task, batch_size=40)
        factors = factorise(model, space, statistics)
        allocation = {n: layer.choices[len(layer) // 2] for n, layer in space.layers.items()}
        refitted = refit_sequentially(factors, allocation, x, batch_size=40)
        network = reestimate_batch_norm(refitted.materialise(allocation), x, batch_size=40)
        assert torch.equal(x, kept)
        results.append(network.eval()(x.clone()))
    assert torch.allclose(*results, atol=1e-4)


def test_objectives_get_their_own_samples() -> None:
    x, y = samples()
    kept = x.clone()

    def spoiling(network: nn.Module, data: Any) -> float:
        data[0].zero_()
        data[1].zero_()
        return 1.0

    def streamed(network: nn.Module, batches: Any) -> float:
        for inputs, _ in batches:
            inputs.zero_()
        return 1.0

    whole = (TensorDataset(x, y), TensorDataset(x, y))
    found = []
    for extra in ([], [Objective(spoiling), Objective(streamed, batches=True)]):
        study = rankNAS.search(
            Net(out_of_place).eval(),
            whole,
            objectives=["accuracy", *extra],
            budget={"macs": 0.5},
            strategy="random",
            n_trials=3,
            settings=rankNAS.Settings(calibration=48, validation=48),
        )
        found.append([t.metrics["loss"] for t in study.trials])
    assert found[0] == found[1] and torch.equal(x, kept)


def test_what_changes_only_in_training_is_copied_there() -> None:
    class Augmenting(Net):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                x.mul_(0.5)
            return super().forward(x)

    x, y = samples()
    kept = x.clone()
    model = Augmenting(out_of_place)
    teacher = copy.deepcopy(model)
    train(model, (x, y), TrainingConfig(epochs=1, batch_size=160, distill=0.5), teacher=teacher)
    assert torch.equal(x, kept)
