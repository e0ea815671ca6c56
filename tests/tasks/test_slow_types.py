"""A warning names the type that a CPU multiplies slowly, and a faster one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from rankNAS.data.loading import load_data
from rankNAS.tasks import slow_types
from rankNAS.tasks.infer import resolve_task

SECONDS = {torch.float16: 40.0, torch.float32: 2.0, torch.bfloat16: 1.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types that were timed, on a CPU of given speeds."""
    found: list[torch.dtype] = []

    def seconds(dtype: torch.dtype) -> float:
        found.append(dtype)
        return SECONDS[dtype]

    monkeypatch.setattr(slow_types, "_seconds", seconds)
    return found


def test_slow_weights_are_named(
    timed: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).half()
    slow_types.warn_of_slow_weights(model)
    assert (
        "in float16, which this CPU multiplies 40 times more slowly than bfloat16" in caplog.text
    )
    assert "hf:FOLDER?dtype=bfloat16" in caplog.text and "model.to(torch.bfloat16)" in caplog.text


def test_other_weights_are_not(timed: list[torch.dtype], caplog: pytest.LogCaptureFixture) -> None:
    slow_types.warn_of_slow_weights(nn.ReLU())
    slow_types.warn_of_slow_weights(nn.Linear(4, 4))
    mixed = nn.Sequential(nn.Linear(9, 9), nn.Linear(2, 2).half(), nn.LayerNorm(9).half())
    slow_types.warn_of_slow_weights(mixed)
    assert not timed  # nothing is measured for these
    slow_types.warn_of_slow_weights(nn.Linear(4, 4).bfloat16())
    assert timed and not caplog.text


def test_a_measurement_is_short_and_positive() -> None:
    assert all(0 < slow_types._seconds(dtype) < 5 for dtype in SECONDS)


def test_a_search_warns_once(timed: list[torch.dtype], caplog: pytest.LogCaptureFixture) -> None:
    items = TensorDataset(torch.rand(8, 4).half(), torch.arange(8) % 2)
    data, model = load_data((items, items)), nn.Linear(4, 2).half()
    task = resolve_task(None, model, data)
    resolve_task(task, model, data)
    assert caplog.text.count("times more slowly") == 1
