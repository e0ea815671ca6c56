"""Networks that are handed out are compared with what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from searches import evaluator_of
from torch import Tensor, nn
from torch.nn import functional

import rankNAS
from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.verification import verify_costs, verify_outputs, verify_plain
from rankNAS.exceptions import NetworkError, ObjectiveError
from rankNAS.recovery.config import TrainingConfig
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.trees import Inputs

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Telling(nn.Module):
    """Computes something else as soon as its second layer is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.first(x))
        x = self.second(x)
        if not isinstance(self.second, nn.Linear):
            x = 2 * x
        return self.head(self.act(x))

    def act(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def low_rank(model: nn.Module, **options: Any) -> tuple[Evaluator, Allocation]:
    torch.manual_seed(0)
    space = compile_space(model.eval(), X[:1])
    factors = factorise(model, space, calibrate(model, space, X, norm="input"), norm="input")
    evaluator = evaluator_of(factors, X, Y, **options)
    return evaluator, Allocation.of(dict.fromkeys(space.layers, Choice("svd", (8,))))


@pytest.mark.parametrize("low_memory", [False, True])
def test_another_function_is_an_error_that_names_the_layer(low_memory: bool) -> None:
    evaluator, allocation = low_rank(Telling(), low_memory=low_memory)
    assert evaluator.evaluate(allocation)
    with pytest.raises(NetworkError, match=r"layer 'head' differs by more than rounding"):
        evaluator.network(allocation)


def test_a_network_that_does_not_run_is_an_error() -> None:
    class Reading(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return functional.linear(self[0](x), self[0].weight.T)

    model = Reading(nn.Linear(64, 64))
    network = Reading(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64)))
    with pytest.raises(NetworkError, match=r"does not run .*no attribute 'weight'"):
        verify_outputs(network, model, Inputs.of(X[:2]))


class Large(nn.Conv2d):
    """Another function of large images, which no small one shows."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(2 * x if x.shape[-1] > 20 else x, self.weight, self.bias)


def test_plain_layers_that_are_another_function_are_an_error() -> None:
    model = nn.Sequential(Large(3, 64, 3), Large(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    verify_plain(with_plain_layers(model), model, Inputs.of(torch.randn(2, 3, 12, 12)))
    x = torch.randn(16, 3, 28, 28)
    given = torch.utils.data.TensorDataset(x, Y)
    with pytest.raises(NetworkError, match="the output of layer '0' differs; if the forward"):
        rankNAS.search(model, (given, given), budget={"macs": 0.8}, n_trials=1)


def test_costs_are_counted_again() -> None:
    evaluator, allocation = low_rank(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    network, space = evaluator.network(allocation), evaluator.factorisation.space
    given = network, space, allocation, evaluator.factorisation.model
    verify_costs(*given, Inputs.of(X[:1]))
    verify_costs(*given, Inputs.of(X[:3]))  # costs are for another batch: not compared
    network[1] = nn.Bilinear(2, 2, 2)  # type: ignore[operator]
    with pytest.raises(NetworkError, match=r"has \d+ parameters.* and '1' has 10 instead of 0;"):
        verify_costs(*given, Inputs.of(X[:1]))
    network[1], network[0] = nn.ReLU(), nn.Linear(64, 64)  # type: ignore[operator]
    with pytest.raises(NetworkError, match=r"layer '0' has 4160 instead of 1088"):
        verify_costs(*given, Inputs.of(X[:1]))


def test_macs_are_counted_again() -> None:
    evaluator, allocation = low_rank(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    network, space = evaluator.network(allocation), evaluator.factorisation.space

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            self[0](x)
            for layer in self:
                x = layer(x)
            return x

    given = Twice(*network), space, allocation, evaluator.factorisation.model
    with pytest.raises(NetworkError, match=r"has \d+ MACs.* layer '0' has 2048 instead of 1024;"):
        verify_costs(*given, Inputs.of(X[:1]))


def test_macs_outside_the_layers_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Buffer(torch.eye(64))

        def forward(self, x: Tensor) -> Any:
            return x @ self.table

    model = nn.Sequential(nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 4))
    evaluator, allocation = low_rank(model)
    network, space = evaluator.network(allocation), evaluator.factorisation.space
    network[1] = Scaled()  # type: ignore[operator]
    given = network, space, allocation, evaluator.factorisation.model
    with pytest.raises(NetworkError, match=r"MACs.* and '1' has 4096 instead of 0;"):
        verify_costs(*given, Inputs.of(X[:1]))


def test_outputs_that_differ_from_pass_to_pass_are_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Counting(nn.Module):
        calls = 1

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x * type(self).calls

    verify_outputs(nn.Identity(), Counting(), Inputs.of(X))
    assert "differ from pass to pass" in caplog.text


class Magnifying(nn.Sequential):
    """Its last layers cancel nearly all of their input, and with it most correct digits."""

    def forward(self, x: Tensor) -> Any:
        x = self[0](x)
        return self[1]((x - x.mean(-1, keepdim=True)) * 1e4)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_rounding_changes_is_not_an_error(
    wrong: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    thin = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False))
    with torch.no_grad():
        thin[1].weight.copy_(torch.ones(64, 8) + 1e-5 * torch.randn(64, 8))
    dense = nn.Linear(64, 64, bias=False)
    dense.weight.data = (thin[1].weight.double() @ thin[0].weight.double()).float()
    head = nn.Linear(64, 4)
    if not wrong:
        verify_outputs(Magnifying(thin, head), Magnifying(dense, head), Inputs.of(X))
        assert "rounding changes the outputs" in caplog.text
        return
    other = nn.Sequential(thin[0], nn.Linear(8, 64, bias=False))
    with pytest.raises(NetworkError, match="differs by more than rounding"):
        verify_outputs(Magnifying(other, head), Magnifying(dense, head), Inputs.of(X))


def test_random_numbers_and_containers_are_compared() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Any:
            noise = torch.rand(1)
            return {"y": [x + noise], "mask": x > 0, "z": (x - torch.inf,)}

    before = torch.random.get_rng_state()
    verify_outputs(Noisy(), Noisy(), Inputs.of(X))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(NetworkError, match="that of no layer does"):
        verify_outputs(nn.Identity(), Noisy(), Inputs.of(X))


def test_a_network_that_is_trained_is_verified_before() -> None:
    data = torch.utils.data.TensorDataset(X.repeat(4, 1), Y.repeat(4))
    settings = rankNAS.Settings(calibration=32, validation=16, recovery=TrainingConfig(epochs=1))
    with pytest.raises(ObjectiveError, match="differs from the one that was measured"):
        rankNAS.search(Telling(), (data, data), budget={"macs": 0.5}, settings=settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_agree_within_their_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [
        part for _ in range(8) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    model(3 * X)
    model = model.eval().to(dtype)
    space = compile_space(model, X[:1].to(dtype))
    x = X.to(dtype)
    factors = factorise(model, space, calibrate(model, space, x, norm="input"), norm="input")
    evaluator = evaluator_of(factors, x, Y)
    for rank in (2, 16):
        allocation = Allocation.of(dict.fromkeys(space.layers, Choice("svd", (rank,))))
        assert next(evaluator.network(allocation).parameters()).dtype == dtype
