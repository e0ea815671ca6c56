"""Costs of the decomposable layers alone, as many papers count."""

from __future__ import annotations

import pytest
import torch
from networks import small, split
from torch import Tensor, nn

import rankNAS
from rankNAS.allocation import Choice
from rankNAS.exceptions import BudgetError
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.strategies.tables import build_problem


def two_layers(keep_output_dense: bool = True) -> SearchSpace:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    return compile_space(
        model, torch.zeros(3, 64), keep_output_dense=keep_output_dense, min_weights=1
    )


def test_closed_form() -> None:
    space = two_layers()
    assert list(space.layers) == ["0"]
    dense, compressed = space.costs(space.dense), space.costs({"0": Choice("svd", (8,))})
    assert (dense["layer_macs"], dense["layer_params"]) == (3 * 64 * 64, 64 * 64 + 64)
    assert compressed["layer_macs"] == 3 * 8 * (64 + 64)
    assert compressed["layer_params"] == 8 * (64 + 64) + 64
    for costs in (dense, compressed):  # the rest: a normalisation and the output layer
        assert costs["macs"] - costs["layer_macs"] == 3 * 64 * 10
        assert costs["params"] - costs["layer_params"] == 2 * 64 + 64 * 10 + 10
    assert dense["weight_bytes"] == 4 * dense["params"]


def test_a_fraction_is_of_the_layers_alone() -> None:
    space = two_layers()
    problem = build_problem(space, None, {"layer_macs": 0.25})
    assert problem.remainder_cost["layer_macs"] == problem.remainder_cost["layer_params"] == 0
    kept = problem.indices({"0": Choice("svd", (8,))})
    assert problem.fractions(kept)["layer_macs"] == 0.25 and problem.meets(kept)
    assert problem.fractions(kept)["macs"] > 0.25
    assert problem.fractions(kept)["layer_params"] == (8 * 128 + 64) / (64 * 64 + 64)
    assert not build_problem(space, None, {"layer_macs": 0.2499}).meets(kept)
    with pytest.raises(BudgetError, match="no allocation keeps layer_params <= 0.001"):
        build_problem(space, None, {"layer_params": 0.001}).check()


def test_both_counts_are_equal_if_everything_is_a_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    space = compile_space(model, torch.zeros(1, 64), keep_output_dense=False, min_weights=1)
    problem = build_problem(space, None, {})
    for layer in (0, 1):
        for choice in range(len(problem.errors[layer])):
            found = problem.fractions(problem.alone(layer, choice))
            assert found["layer_macs"] == found["macs"]
            assert found["layer_params"] == found["params"]


@pytest.mark.parametrize("name", ["layer_macs", "layer_params"])
def test_a_search_meets_the_budget_as_counted(name: str) -> None:
    study = rankNAS.search(
        small(),
        split(),
        objectives=["accuracy", name],
        budget={name: 0.4},
        strategy="uniform",
        n_trials=1,
        settings=rankNAS.Settings(calibration=32, validation=32, norm="weight"),
    )
    metrics = study.best.metrics
    assert 0 < metrics[name] <= 0.4 * study.dense[name]
    network = study.materialise()
    rest = study.dense["params"] - study.dense["layer_params"]
    parameters: list[Tensor] = list(network.parameters())
    assert sum(p.numel() for p in parameters) - rest == metrics["layer_params"]
    assert study.best.values[1] == metrics[name]
