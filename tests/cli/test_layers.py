"""The chosen ranks of an answer, in the result document."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.cli.layers import describe_layers
from rankNAS.hw_models import CallableModel, compile_latency
from rankNAS.search_spaces import compile_space
from rankNAS.strategies.tables import build_problem


def test_layers_have_their_rank_its_limits_and_their_costs(small_net: nn.Module) -> None:
    space = compile_space(small_net, torch.zeros(1, 3, 8, 8))
    allocation = Allocation.of(dict.fromkeys(space.layers, DENSE) | {"conv2": Choice("svd", (4,))})
    problem = build_problem(space, None, {})
    found = describe_layers(problem, space.layers, allocation)
    assert list(found) == list(space.layers)
    assert json.loads(json.dumps(found)) == found
    # 16 x 144 weights: 14 x (16 + 144) = 2240 < 2304 < 15 x (16 + 144)
    assert found["conv2"] == {
        "macs": 16 * 144 * 64,
        "best_macs": 4 * (144 + 16) * 64,
        "shape": "16 to 16, 3 x 3",
        "roles": [],
        "operator": "svd",
        "rank": [4],
        "break_even_rank": [14],
        "full_rank": [16],
        "full_macs": 16 * (144 + 16) * 64,
    }
    dense = found["linear"]
    assert dense["operator"] == "dense" and dense["rank"] == []
    assert dense["macs"] == dense["best_macs"] == 16 * 64
    assert dense["full_rank"] is None and dense["break_even_rank"] is None


def test_layers_have_predicted_latencies_where_there_are_any(small_net: nn.Module) -> None:
    space = compile_space(small_net, torch.zeros(1, 3, 8, 8))
    model = CallableModel(lambda layer, choice: 1e-9 * layer[choice].macs)
    bound = model.bind(small_net, space, torch.zeros(1, 3, 8, 8))
    problem = build_problem(space, None, {}, latency=compile_latency(bound, space))
    allocation = Allocation.of(dict.fromkeys(space.layers, DENSE) | {"conv2": Choice("svd", (4,))})
    found = describe_layers(problem, space.layers, allocation)["conv2"]
    assert found["predicted_latency"] == pytest.approx(1e-9 * 16 * 144 * 64)
    assert found["best_predicted_latency"] == pytest.approx(1e-9 * 4 * 160 * 64)
