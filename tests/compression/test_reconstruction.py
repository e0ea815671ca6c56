"""Factors for the inputs that a compressed network really has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from searches import evaluator_of
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation
from rankNAS.compression.batch_norm import reestimate_batch_norm, tracking_layers
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.compression.reconstruction import (
    SequentialRefit,
    _fitted_layer,
    refit_sequentially,
)
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.search_spaces.compiler import compile_space


def images(n: int = 120) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, stride=2, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 20),
        nn.ReLU(),
        nn.Linear(20, 6),
    )
    model(images() * 1.5 + 0.2)
    return model.eval()


def linear(width: int = 10) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)).eval()


def factorised(model: nn.Module, x: Tensor, **options: Any) -> Factorisation:
    space = compile_space(model, x[:1], min_weights=1, keep_output_dense=False)
    return factorise(
        model, space, calibrate(model, space, x, norm="input"), norm="input", **options
    )


def cheap(factorisation: Factorisation, position: int = -1) -> Allocation:
    layers = factorisation.space.layers
    return Allocation.of({n: layer.choices[position] for n, layer in layers.items()})


def test_without_compression_nothing_changes() -> None:
    x = images()
    found = factorised(convolutional(), x)
    refitted = refit_sequentially(found, found.space.dense, x)
    network = refitted.materialise(found.space.dense)
    torch.testing.assert_close(network(x), found.model(x), rtol=1e-4, atol=1e-5)


def test_a_dense_layer_becomes_the_least_squares_solution_for_its_inputs() -> None:
    x = torch.randn(1000, 10, generator=torch.Generator().manual_seed(2)) + 0.3
    found = factorised(linear(), x)
    first, last = found.space.layers
    allocation = Allocation.of({first: found.space.layers[first].choices[-1], last: DENSE})
    network = refit_sequentially(found, allocation, x).materialise(allocation)
    hidden = torch.tanh(network[0](x)).double()  # type: ignore[index]
    columns = torch.cat([hidden, torch.ones(len(x), 1)], 1)
    solution = torch.linalg.lstsq(columns, found.model(x).double()).solution
    best = (columns @ solution - found.model(x)).square().mean()
    actual = (network(x) - found.model(x)).square().mean()
    assert best <= actual <= 1.02 * best  # a little shrinkage
    plain = found.materialise(allocation)
    assert actual < (plain(x) - found.model(x)).square().mean()


@pytest.mark.parametrize("position", [-1, -3])
def test_outputs_come_closer_to_those_of_the_dense_network(position: int) -> None:
    x = torch.randn(600, 10, generator=torch.Generator().manual_seed(2)) @ torch.randn(10, 10)
    found = factorised(linear(), x)
    allocation = cheap(found, position)
    plain = found.materialise(allocation)
    refitted = refit_sequentially(found, allocation, x).materialise(allocation)
    distance = [(network(x) - found.model(x)).square().mean() for network in (plain, refitted)]
    assert distance[1] < distance[0]


class Untraceable(nn.Module):
    """A network whose forward pass depends on the data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y if bool(x.sum() < torch.inf) else -y


def test_networks_that_cannot_be_traced_get_the_same_factors() -> None:
    x = images()
    traced, not_traced = convolutional(), Untraceable(convolutional())
    states = []
    for model in (traced, not_traced):
        found = factorised(model, x)
        allocation = cheap(found, -2)
        states.append(
            refit_sequentially(found, allocation, x).materialise(allocation).state_dict()
        )
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][f"inner.{name}"], value, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_keeps_its_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.repeated, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.repeated(torch.tanh(self.repeated(x))))
            return y

    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    found = factorised(Twice().eval(), x)
    allocation = cheap(found)
    networks = [
        f.materialise(allocation) for f in (found, refit_sequentially(found, allocation, x))
    ]
    first, second = (network.state_dict() for network in networks)
    same = {name: torch.equal(first[name], second[name]) for name in first}
    assert all(v for n, v in same.items() if n.startswith("repeated"))
    assert not all(v for n, v in same.items() if n.startswith("last"))


def test_too_few_samples_change_nothing() -> None:
    # Inputs of few dimensions, for which 20 samples are enough on held-out ones.
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(2)) @ torch.randn(
        3, 10, generator=torch.Generator().manual_seed(4)
    )
    found = factorised(linear(), x)
    allocation = cheap(found)
    plain = found.materialise(allocation).state_dict()
    for samples, same in ((19, True), (20, False)):
        refitted = (
            refit_sequentially(found, allocation, x[:samples]).materialise(allocation).state_dict()
        )
        assert all(torch.equal(plain[k], refitted[k]) for k in plain) == same


def test_the_factorisation_is_left_alone_and_so_are_later_evaluations() -> None:
    x = images()
    y = torch.randint(6, (len(x),), generator=torch.Generator().manual_seed(1))
    found = factorised(convolutional(), x)
    before = copy.deepcopy(found.model.state_dict())
    evaluator = evaluator_of(found, x, y, sequential=True)
    untouched = evaluator_of(found, x, y)
    allocations = [cheap(found, -1), found.space.dense, cheap(found, -2)]
    for allocation in allocations:
        refitted = evaluator.network(allocation)
        plain = untouched.network(allocation)
        if allocation != found.space.dense:
            assert not torch.equal(refitted(x), plain(x))
        for other in allocations:
            evaluator.forget()
            assert evaluator.evaluate(other) == untouched.evaluate(other)
    assert all(torch.equal(v, before[k]) for k, v in found.model.state_dict().items())


def test_heavy_weights_are_refitted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    found = factorised(convolutional(), x)
    for allocation in (cheap(found), found.space.dense):
        monkeypatch.undo()
        light = refit_sequentially(found, allocation, x).materialise(allocation).state_dict()
        monkeypatch.setattr("rankNAS.compression.surgery.LIGHT", 0)
        heavy = refit_sequentially(found, allocation, x).materialise(allocation).state_dict()
        assert all(torch.equal(v, heavy[k]) for k, v in light.items())
    refitted = refit_sequentially(found, cheap(found), x)
    lie = {p.data_ptr() for p in found.model.parameters()}
    assert all(p.data_ptr() in lie for p in refitted.model.parameters())


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_refitted_evaluation_is_that_of_the_network(low_memory: bool) -> None:
    x = images()
    y = torch.randint(6, (len(x),), generator=torch.Generator().manual_seed(1))
    found = factorised(convolutional(), x)
    evaluator = evaluator_of(found, x, y, sequential=True, low_memory=low_memory)
    for allocation in (cheap(found, -2), cheap(found, -1)):
        metrics = evaluator.evaluate(allocation, final=True)
        network = evaluator.network(allocation)
        expected = network_metrics(network, Samples.of((x, y)), evaluator.task)
        assert set(expected) >= {"accuracy", "loss"}
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-5)
        plain = evaluator.evaluate(allocation)
        assert abs(plain["loss"] - metrics["loss"]) > 1e-4
        again = evaluator.evaluate(allocation, final=True)
        assert again == metrics
    evaluator.remember(allocation, {"loss": 7.0}, final=True)
    assert evaluator.evaluate(allocation, final=True) == {"loss": 7.0}
    assert evaluator.evaluate(allocation) == plain
    without = evaluator_of(found, x, y)
    assert without.evaluate(allocation, final=True) == without.evaluate(allocation)


@pytest.mark.parametrize("memory", [0, 1 << 14, 1 << 30])
def test_kept_dense_outputs_give_the_same_factors(memory: int) -> None:
    x = images()
    found = factorised(convolutional(), x)
    refit = SequentialRefit(found, x, batch_size=50, memory=memory)
    for allocation in (cheap(found, -1), found.space.dense, cheap(found, -2), cheap(found, -1)):
        fresh = refit_sequentially(found, allocation, x, batch_size=50)
        again = refit.factors(allocation)
        expected = fresh.materialise(allocation).state_dict()
        actual = again.materialise(allocation).state_dict()
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        assert fresh.statistics.keys() == again.statistics.keys() and len(fresh.statistics) == 2
        for name, pair in fresh.statistics.items():
            assert all(map(torch.equal, pair, again.statistics[name]))


def test_the_latest_refits_are_kept_and_no_training_changes_them() -> None:
    x = images()
    found = factorised(convolutional(), x)
    refit = SequentialRefit(found, x)
    refit._most = 2
    allocations = [cheap(found, position) for position in (-1, -2, -3)]
    first = refit.factors(allocations[0])
    network = first.materialise(allocations[0])
    expected = copy.deepcopy(network)(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert refit.factors(allocations[0]) is first
    again = first.materialise(allocations[0])
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    for allocation in allocations[1:]:
        refit.factors(allocation)
    assert refit.factors(allocations[0]) is not first


@pytest.mark.parametrize("traced", [True, False])
def test_statistics_are_those_of_a_pass_through_the_refitted_network(traced: bool) -> None:
    x = images()
    found = factorised(convolutional() if traced else Untraceable(convolutional()), x)
    allocation = cheap(found, -2)
    refitted = refit_sequentially(found, allocation, x, batch_size=40)
    network = reestimate_batch_norm(refitted.materialise(allocation), x, batch_size=40)
    measured = list(refitted.statistics.values())
    for layer, (mean, variance) in zip(tracking_layers(network), measured, strict=True):
        assert layer.running_mean is not None and layer.running_var is not None
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [24, 60, 400])
def test_the_error_on_held_out_patches_never_grows(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(2))
    found = factorised(linear(), torch.cat([x, torch.randn(400, 10)]))
    seen: list[tuple[float, float]] = []
    module = "rankNAS.compression.reconstruction"

    def recorded(layer: Any, choice: Any, fit: Any, held: Any) -> Any:
        result = original(layer, choice, fit, held)
        trial = layer if result is layer else _fitted_layer(layer, choice, fit, chosen[-1])
        seen.append(tuple(error(layer, f, choice, fit, held) for f in (trial, layer)))  # type: ignore[arg-type]
        return result

    reconstruction: Any = __import__(module, fromlist=["_refitted_layer"])
    original, error = reconstruction._refitted_layer, reconstruction._error
    chosen: list[float] = []
    choose = reconstruction.choose_shrinkage

    def choosing(*args: Any) -> float:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(f"{module}.choose_shrinkage", choosing)
    monkeypatch.setattr(f"{module}._refitted_layer", recorded)
    refit_sequentially(found, cheap(found), x)
    assert len(seen) == 2 and all(after <= before for after, before in seen)
