from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.hw_models import (
    HW_MODELS,
    CallableModel,
    HardwareModel,
    compile_latency,
    make_hardware,
)
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.testing import HardwareContract


@cache
def space() -> SearchSpace:
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(2),
        nn.Linear(36, 16),
        nn.Conv1d(16, 16, 3, groups=2),
    )
    policy = RankPolicy(candidates=8)
    inputs = torch.randn(2, 4, 6, 6)
    return compile_space(model, inputs, policy=policy, min_weights=1, keep_output_dense=False)


def by_macs(layer: Layer, choice: Choice) -> float:
    return layer[choice].macs / 1e9


class TestCallableModel(HardwareContract):
    hardware = CallableModel(by_macs)


def test_functions() -> None:
    model = CallableModel(by_macs)
    assert model.name == "by_macs" and CallableModel(by_macs, "mine").name == "mine"
    for layer in space().layers.values():
        for choice in layer:
            assert model.latency(layer, choice) == (layer[choice].macs / 1e9, 0.0)


def test_tables_are_in_the_order_of_the_space() -> None:
    seen: list[tuple[int, int]] = []
    tables = compile_latency(CallableModel(by_macs), space(), lambda *done: seen.append(done))
    assert list(tables.seconds) == list(space().layers)
    for name, layer in space().layers.items():
        assert tables.seconds[name].tolist() == [cost.macs / 1e9 for cost in layer.costs]
    count = len(space().layers)
    assert seen == [(i + 1, count) for i in range(count)]
    assert tables.energy is None and tables.predict_energy(space().dense) is None


class Board(HardwareModel):
    """Every choice takes a millisecond a parameter, uncertain by a tenth of it."""

    name = "board"

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        seconds = 1e-3 * layer[choice].params
        return seconds, 0.1 * seconds

    def energy(self, layer: Layer, choice: Choice) -> float | None:
        return 2.0 * layer[choice].params

    def remainder_cost(self, space: SearchSpace) -> tuple[float, float]:
        return 5.0, 0.3


def test_a_whole_network_adds_up_with_its_uncertainty() -> None:
    tables = compile_latency(Board(), space())
    last = {name: layer.choices[-1] for name, layer in space().layers.items()}
    for allocation in (space().dense, last):
        params = [space().layers[name][choice].params for name, choice in allocation.items()]
        seconds, sigma = tables.predict(allocation)
        assert seconds == pytest.approx(5.0 + 1e-3 * sum(params))
        assert sigma == pytest.approx(math.hypot(0.3, *(1e-4 * p for p in params)))
        assert tables.predict_energy(allocation) == pytest.approx(2.0 * sum(params))


def test_tables_of_some_choices() -> None:
    tables = compile_latency(Board(), space())
    kept = {name: (DENSE, layer.choices[-1]) for name, layer in space().layers.items()}
    some = tables.restrict(kept)
    last = {name: choices[-1] for name, choices in kept.items()}
    assert some.predict(last) == tables.predict(last)
    assert some.predict_energy(last) == tables.predict_energy(last)
    assert [len(s) for s in some.seconds.values()] == [2] * len(kept)


def test_a_space_at_another_batch_size() -> None:
    larger = space().at_batch(6)  # of 2
    assert larger.input_shape == (6, 4, 6, 6)
    assert larger.dense_cost.macs == 3 * space().dense_cost.macs
    assert larger.dense_cost.params == space().dense_cost.params
    for name, layer in larger.layers.items():
        shape = space().layers[name].shape
        assert [c[0] for c in layer.shape.calls] == [3 * c[0] for c in shape.calls]
        assert layer.shape.cost().macs == layer[DENSE].macs
    with pytest.raises(UsageError, match="multiple of 2, got 3"):
        space().at_batch(3)


@pytest.mark.parametrize("what", ["sigma", "remainder_cost"])
def test_other_bad_predictions(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "sigma":
        monkeypatch.setattr(Board, "latency", lambda *_: (1.0, math.nan))
    else:
        monkeypatch.setattr(Board, "remainder_cost", lambda *_: (-1.0, 0.0))
    with pytest.raises(UsageError, match="'board' gave"):
        compile_latency(Board(), space())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_tables_name_the_layer_and_the_choice_of_a_bad_prediction(bad: float) -> None:
    layer = space().layers["4"]
    choice = layer.choices[3]

    def broken(of: Layer, given: Choice) -> float:
        return bad if (of.name, given) == ("4", choice) else 1.0

    message = rf"'broken' gave {bad} seconds for layer '4' as {choice}; expected a positive"
    with pytest.raises(UsageError, match=message):
        compile_latency(CallableModel(broken), space())


def test_names(tmp_path: Path) -> None:
    for name, kind in HW_MODELS.items():
        assert make_hardware(name) == kind() and make_hardware(name).name == name
    assert make_hardware(own := Board()) is own
    with pytest.raises(UnknownNameError, match=r"unknown hardware model 'hots'.*mean 'host'"):
        make_hardware("hots")
    with pytest.raises(UsageError, match=r"got function; wrap a function as CallableModel\("):
        make_hardware(by_macs)  # type: ignore[arg-type]
    file = tmp_path / "device.py"
    file.write_text("def slow(layer, choice): return layer[choice].params * 1e-6\n")
    model = make_hardware(f"{file}:slow")
    layer = space().layers["4"]
    assert model.name == "slow"
    assert model.latency(layer, DENSE) == (pytest.approx((36 * 16 + 16) * 1e-6), 0.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'slow'"):
        make_hardware(f"{file}:solw")
