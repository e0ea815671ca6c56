"""Zero or repeated weights and dead inputs: finite factors, true errors, a named warning."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from rankNAS import Settings, search
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.decompositions import OPERATORS, ErrorNorm, Svd, Target, make_norm
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.testing import definition_of_error, random_statistics


def network(spoil: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
    ).append(nn.Linear(8 * 36, 5))
    x = torch.randn(12, 4, 6, 6)
    with torch.no_grad():
        if spoil == "zero":
            model[2].weight.zero_()
        elif spoil == "repeated":
            model[2].weight.copy_(model[2].weight[:1].expand(8, -1, -1, -1).clone())
        elif spoil == "dead":
            model[0].weight.zero_()
            model[0].bias.fill_(-1.0)  # all outputs of the ReLU are zero
        else:
            x[:, 1:] = 0.0
    return model.eval(), x


@pytest.mark.parametrize("norm", ["weight", "input", "fisher", "pooled", "asvd"])
@pytest.mark.parametrize("spoil", ["zero", "repeated", "dead", "empty"])
def test_factors_and_errors_are_finite(
    spoil: str, norm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = network(spoil)
    space = compile_space(model, x[:1], min_weights=1)
    with caplog.at_level(logging.WARNING):
        found = factorise(model, space, calibrate(model, space, x, norm=norm), norm=norm)
    for name, layer in space.layers.items():
        assert all(0 <= error <= 1 for error in found.errors()[name])
        for choice in layer.choices:
            weight, bias = found.layers[name].folded(choice)
            assert weight.isfinite().all() and (bias is None or bias.isfinite().all())
    allocation = {name: layer.choices[-1] for name, layer in space.layers.items()}
    assert found.materialise(allocation)(x).isfinite().all()
    if spoil == "zero" or (spoil == "dead" and norm == "weight"):
        assert "is zero" in caplog.text
    if spoil == "dead" and norm != "weight":
        assert "the inputs of layer '2' are zero" in caplog.text


@pytest.mark.parametrize("strategy", ["solve", "auto"])
@pytest.mark.parametrize("spoil", ["zero", "repeated", "dead", "empty"])
def test_a_search_returns_a_finite_network(spoil: str, strategy: str) -> None:
    model, x = network(spoil)
    x = x.repeat(8, 1, 1, 1)
    with torch.no_grad():
        data = TensorDataset(x, model(x).argmax(1))
    study = search(
        model,
        (data, data),
        budget={"macs": 0.6},
        strategy=strategy,
        n_trials=2,
        space=compile_space(model, x[:1], min_weights=1),
        settings=Settings(calibration=32, validation=32),
    )
    assert study.best.metrics["macs"] <= 0.6 * study.dense["macs"]
    assert all(math.isfinite(value) for value in study.best.metrics.values())
    if spoil != "empty":
        assert study.best.metrics["accuracy"] == study.dense["accuracy"]


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, x = network("repeated")
    space = compile_space(model, x[:1], min_weights=1)
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(RankNASError, match="the weight of layer '2' is not finite"):
        factorise(model, space)


@pytest.mark.parametrize("samples", [None, 40], ids=["single", "falls back to double"])
def test_single_precision_agrees_with_double(
    samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LayerShape(60, 40, (3, 3), calls=((1, 6, 6),))
    weight = torch.randn(1, 40, 60, 3, 3, generator=torch.Generator().manual_seed(0))
    norm = make_norm("fisher", random_statistics(shape, samples=samples))
    ranks = {n: [f[-1] for f in OPERATORS[n].families(shape)] for n in OPERATORS}
    found = {}
    for wide in (10**9, 1):
        monkeypatch.setattr("rankNAS.decompositions.norms.WIDE", wide)
        target = Target(weight, norm)
        found[wide] = {n: OPERATORS[n].factorise(shape, target, ranks[n]) for n in OPERATORS}
        assert bool(target.ill_conditioned) == (wide == 1 and samples is not None)
    for name, asked in ranks.items():
        for rank in asked:
            one, other = found[10**9][name], found[1][name]
            assert one.error(rank) == pytest.approx(other.error(rank), abs=1e-3)
            direct = definition_of_error(norm, weight.double().flatten(2), other.weight(rank))
            assert other.error(rank) == pytest.approx(direct, abs=1e-3)


def test_double_weights_stay_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankNAS.decompositions.norms.WIDE", 1)
    shape = LayerShape(12, 9)
    target = Target(torch.randn(1, 9, 12, 1, 1).double(), ErrorNorm())
    assert Svd().factorise(shape, target, [(3,)]).weight((3,)).dtype == torch.float64
    assert target.precision == torch.float64
