"""Measured latency of the answers."""

from __future__ import annotations

import pytest
from torch import nn
from torch.utils.data import TensorDataset

from rankNAS.cli import measuring
from rankNAS.cli.measuring import concerns_latency, measure
from rankNAS.engine import search
from rankNAS.hw_models import CallableModel
from rankNAS.settings import Settings
from rankNAS.study import Study

Sets = tuple[TensorDataset, TensorDataset]


def searched(model: nn.Module, data: Sets, budget: dict[str, float]) -> Study:
    return search(
        model,
        data,
        budget=budget,
        strategy="uniform",
        settings=Settings(calibration=32, validation=32, sequential=False),
        hardware=CallableModel(lambda layer, choice: 1e-9 * layer[choice].macs),
    )


def test_only_a_search_about_latency_is_timed(small_net: nn.Module, small_data: Sets) -> None:
    assert concerns_latency(searched(small_net, small_data, {"latency": 0.8}))
    assert not concerns_latency(searched(small_net, small_data, {"macs": 0.8}))


def test_the_dense_network_is_timed_beside_the_answers(
    small_net: nn.Module, small_data: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.1)
    study = searched(small_net, small_data, {"macs": 0.8})
    times = measure(study, [study.best.allocation] * 2, batch=4)
    assert len(times) == 3
    for found in times:
        assert 0 < found["seconds"] < 1 and found["spread"] >= 0
        assert 3 <= found["rounds"] <= measuring.ROUNDS
