from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space


def linear(bias: bool = True) -> tuple[nn.Module, SearchSpace, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16, bias=bias))
    x = torch.randn(200, 20) @ torch.randn(20, 20) + 3 * torch.randn(20)
    return model, compile_space(model, x[:1], keep_output_dense=False, min_weights=1), x


@pytest.mark.parametrize("norm", ["input", "fisher"])
def test_a_corrected_bias_keeps_the_mean_output(norm: Any) -> None:
    model, space, x = linear()
    statistics = calibrate(model, space, x, norm=norm)
    factorisation = factorise(model, space, statistics, norm=norm)
    uncentred = factorise(model, space, statistics, norm=norm, centred=False)
    y = model(x).detach()
    mean, scale = y.mean(0), float(y.abs().max())
    for choice in space.layers["0"].choices[1:]:
        network = factorisation.materialise({"0": choice})
        torch.testing.assert_close(network(x).mean(0), mean, rtol=0, atol=2e-6 * scale)
    smallest = {"0": Choice("svd", (1,))}
    shifted = uncentred.materialise(smallest)(x).mean(0)
    assert (shifted - mean).abs().max() > 1e-3 * scale

    # and what remains is the variance alone, which a centred fit makes smaller
    def mse(network: nn.Module) -> float:
        return float((network(x) - y).detach().double().square().sum())

    if norm == "input":
        best, other = (mse(f.materialise(smallest)) for f in (factorisation, uncentred))
        assert best <= other * (1 + 1e-6)


def test_the_relative_error_is_that_of_the_outputs() -> None:
    model, space, x = linear(bias=False)
    factorisation = factorise(model, space, calibrate(model, space, x, norm="input"), norm="input")
    y = model(x).detach().double()
    for choice, error in zip(space.layers["0"], factorisation.errors()["0"], strict=True):
        z = factorisation.materialise({"0": choice})(x).detach().double()
        assert error == pytest.approx(
            float((z - y).square().sum() / y.square().sum()), rel=1e-2, abs=2e-6
        )
