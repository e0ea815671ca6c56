"""Predicted against measured."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import CallableModel, agreement, compile_latency, validate, validation
from rankNAS.hw_models.networks import random_allocations
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)).eval()


def space() -> SearchSpace:
    return compile_space(network(), torch.randn(1, 32), min_weights=1)


TABLES = compile_latency(CallableModel(lambda layer, choice: 1e-6 * layer[choice].macs), space())


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_times_are_relative_to_the_dense_network(
    drift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that gets slower from one visit to the next does not change what is found."""
    visits = []

    def visit(runs: list[float], _: int) -> np.ndarray:
        visits.append(len(runs))
        return np.array([runs] * 5) * (1 + drift * (len(visits) - 2))

    monkeypatch.setattr(validation, "waiting", lambda run, device: run)
    monkeypatch.setattr(validation, "built", lambda _, a, x: 1.1 * TABLES.predict(a)[0])
    monkeypatch.setattr(validation, "_visit", visit)
    found = random_allocations(space(), 20, seed=0)
    named = {str(i): a for i, a in enumerate(found)}
    rows = validate(TABLES, network(), torch.randn(1, 32), named, seconds=0)
    assert visits == [10, 10, 6] and rows.name.tolist() == ["dense", "dense", *named]
    np.testing.assert_allclose(rows.measured, 1.1 * rows.predicted, rtol=1e-9)
    figures = agreement(rows)
    assert figures.within == 1.0 and figures.bias == pytest.approx(1 / 1.1 - 1)
    assert figures.mape == pytest.approx(1 - 1 / 1.1) and figures.spearman > 0.999
    assert figures.floor == 0 and figures.uncertainty == 0 and figures.relative == 1.0


def test_visits_that_differ_count_more_than_rounds_that_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state of the machine: it changes some networks' times more than others'."""
    rng = np.random.default_rng(0)
    named = {str(i): a for i, a in enumerate(random_allocations(space(), 8, seed=0))}
    visits = []

    def visit(runs: list[float], _: int) -> np.ndarray:
        visits.append(1)
        own = np.array([1, 1, *np.exp(0.05 * rng.standard_normal(8))])
        return np.array(runs) * own * np.exp(0.001 * rng.standard_normal((50, 10)))

    monkeypatch.setattr(validation, "waiting", lambda run, device: run)
    monkeypatch.setattr(validation, "built", lambda _, a, x: TABLES.predict(a)[0])
    monkeypatch.setattr(validation, "_visit", visit)
    rows = validate(TABLES, network(), torch.randn(1, 32), named, precision=0.02)
    # Of a median: 1.25 times that of a mean.
    expected = 1.96 * 1.25 * 0.05 / math.sqrt(len(visits))
    assert agreement(rows).uncertainty == pytest.approx(expected, rel=0.3) and len(visits) > 20
    errors = (np.log(rows.measured / rows.predicted))[2:]
    assert errors.std() < 0.02
    assert (rows.rounds == 50 * len(visits)).all()


def test_real_networks_are_measured_in_the_time_that_is_given() -> None:
    named = {"a": space().dense, "b": random_allocations(space(), 1, seed=3)[0]}
    seen: list[tuple[int, int]] = []
    rows = validate(
        TABLES,
        network(),
        torch.randn(1, 32),
        named,
        batch=3,
        seconds=0.2,
        on_progress=lambda *done: seen.append(done),
    )
    assert rows.name.tolist() == ["dense", "dense", "a", "b"]
    assert (rows.measured > 0).all() and (rows.rounds >= 3).all()
    assert seen == [(99, 100), (100, 100)]


def test_the_figures_by_hand() -> None:
    rows = pd.DataFrame(
        {
            "predicted": [1.0, 1.0, 1.1, 0.5, 3.0, 4.0],
            "measured": [1.0, 1.02, 1.0, 1.0, 2.0, 4.0],
            "deviation": [0.0, 0.0, 0.01, 0.02, 0.02, 0.2],
        }
    )
    found = agreement(rows)
    assert found.within == 0.5
    assert found.relative == 0.25  # 1.01 * 1.1 / 1.0 is just outside
    assert math.isnan(found.slowness) and math.isnan(found.matched)
    assert found.mape == pytest.approx((0.1 + 0.5 + 0.5 + 0) / 4)
    assert found.bias == pytest.approx((0.1 - 0.5 + 0.5 + 0) / 4)
    assert found.floor == pytest.approx(0.02)
    assert found.uncertainty == pytest.approx(1.96 * 0.015)
    assert math.isnan(agreement(rows.head(4)).spearman)


def test_a_machine_that_has_become_slower_is_told_from_a_wrong_prediction() -> None:
    predicted = np.array([1.0, 1.0, 0.8, 0.6, 0.4])
    found = agreement(rows := _rows(predicted, 1.25 * predicted), timed=1.0)
    assert (found.within, found.slowness, found.matched) == (0.0, 1.25, 1.0)
    # As slow as then, so what is wrong are the predictions; the dense one hides that.
    found = agreement(rows, timed=1.25)
    assert (found.within, found.slowness, found.matched, found.relative) == (0.0, 1.0, 0.0, 1.0)
    # Slower, and one prediction of three is wrong in its own right.
    found = agreement(_rows(predicted, predicted * [1.25, 1.25, 1.25, 1.25, 1.5]), timed=1.0)
    assert found.matched == pytest.approx(2 / 3)
    assert math.isnan(agreement(rows, timed=0.0).slowness)


def _rows(predicted: np.ndarray, measured: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"predicted": predicted, "measured": measured, "deviation": 0.0})


def test_noise_bounds_the_rank_correlation_even_of_a_perfect_prediction() -> None:
    def found(deviation: float) -> tuple[float, float]:
        # Normal, and so is the noise: their correlation is 1 / sqrt(1 + deviation^2).
        times = 10 + np.random.default_rng(1).standard_normal(4000)
        rows = {"predicted": times, "measured": times, "deviation": deviation}
        return agreement(pd.DataFrame(rows)).perfect

    assert found(0.0) == (pytest.approx(1), pytest.approx(1))
    low, median = found(0.5)
    pearson = 1 / math.sqrt(1 + 0.25)
    assert median == pytest.approx(6 / math.pi * math.asin(pearson / 2), abs=0.01)
    assert median - 0.02 < low < median
    few = pd.DataFrame({"predicted": [1.0, 1, 2], "measured": [1.0, 1, 2], "deviation": 0.1})
    assert all(map(math.isnan, agreement(few).perfect))


def test_nothing_to_validate() -> None:
    with pytest.raises(UsageError, match="no allocation"):
        validate(TABLES, network(), torch.randn(1, 32), dict[str, Allocation]())
