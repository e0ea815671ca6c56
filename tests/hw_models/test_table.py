"""Layers measured elsewhere."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import MeasuredTable, compile_latency, make_hardware
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space

HEADER = "layer,choice,seconds"


def space() -> SearchSpace:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    return compile_space(model, torch.zeros(1, 32), min_weights=1)


def written(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "board.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def rank(r: int) -> Choice:
    return Choice("svd", (r,))


def test_measured_values_are_given_back(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "0,dense,5e-3,1e-4",
        "0,svd:8,2e-3,",
        "rest,all,1e-3,2e-4",
        header=HEADER + ",sigma",
    )
    model = make_hardware(str(path)).bind(None, space())
    layer = space().layers["0"]
    assert model.name == "board"
    assert model.latency(layer, DENSE) == (5e-3, 1e-4)
    assert model.latency(layer, rank(8)) == (2e-3, 0.0)
    assert model.remainder_cost(space()) == (1e-3, 2e-4)


def test_ranks_between_two_measured_ones_are_on_a_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "0,svd:2,1e-3,1e-4",
        "0,svd:4,2e-3,2e-4",
        "0,svd:12,6e-3,0",
        header=HEADER + ",sigma",
    )
    model = MeasuredTable.read(path, strict=True).bind(None, space())
    layer = space().layers["0"]
    assert model.latency(layer, rank(6))[0] == pytest.approx(3e-3)
    seconds, sigma = model.latency(layer, rank(3))
    assert seconds == pytest.approx(1.5e-3)
    assert sigma == pytest.approx(math.hypot(0.5e-4, 1e-4))
    for choice in (rank(1), rank(13), DENSE):
        with pytest.raises(UsageError, match=rf"'board' has no layer '0' as {choice}; measure"):
            model.latency(layer, choice)


def test_the_rest_is_predicted_from_multiply_adds_with_a_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = space().layers["0"]
    macs = [layer[rank(r)].macs for r in (2, 4, 8)]
    rows = [f"0,svd:{r},{1e-4 + 1e-7 * m}" for r, m in zip((2, 4, 8), macs, strict=True)]
    model = MeasuredTable.read(written(tmp_path, *rows)).bind(None, space())
    with caplog.at_level(logging.WARNING):
        tables = compile_latency(model, space())
    for name, other in space().layers.items():
        expected = [1e-4 + 1e-7 * cost.macs for cost in other.costs]
        assert tables.seconds[name].tolist() == pytest.approx(expected, rel=1e-6)
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 6  # two layers; dense, group_svd, and svd at ranks not in between
    assert any("layer '1' as svd" in text for text in named)


def test_times_that_fall_with_the_work_give_their_mean(tmp_path: Path) -> None:
    path = written(tmp_path, "0,svd:2,3e-3", "0,svd:8,1e-3")
    model = MeasuredTable.read(path).bind(None, space())
    assert model.latency(space().layers["1"], DENSE)[0] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("layer,seconds", ["0,1"], "has no column 'choice'; it needs layer, choice and seconds"),
        (HEADER, ["0,dense,-1"], "layer '0' as dense takes -1 seconds; expected a positive"),
        (HEADER, ["0,dense,"], "layer '0' as dense takes nan seconds"),
        (HEADER, ["0,dense,fast", "0,svd:2,1"], "takes fast seconds"),
        (HEADER, ["0,dense,1", "0,dense,2"], "gives layer '0' as dense twice"),
        (HEADER + ",batch", ["0,dense,1,1", "0,svd:2,1,8"], "mixes figures for batch 1 and 8"),
        (HEADER + ",batch", ["0,dense,1,x"], "the batch size 'x'; expected an integer"),
    ],
)
def test_wrong_tables_are_named(
    tmp_path: Path, header: str, rows: list[str], message: str
) -> None:
    path = written(tmp_path, *rows, header=header)
    with pytest.raises(UsageError, match=message) as caught:
        MeasuredTable.read(path)
    assert "board.csv" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        make_hardware(str(tmp_path / "none.csv"))
    path = tmp_path / "bad.csv"
    for content in (b"", b"\xff\xfe\x00", b'"', b"layer,choice,seconds\n0,dense,1,2,3\n0,dense\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.csv"):
            make_hardware(str(path))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("batch", "8", "at batch size 8, but 1 is asked for"),
        ("dtype", "float16", "with float16 weights, but layer '0' has float32"),
    ],
)
def test_tables_for_something_else_are_refused(
    tmp_path: Path, column: str, value: str, message: str
) -> None:
    path = written(tmp_path, f"0,dense,1e-3,{value}", header=f"{HEADER},{column}")
    with pytest.raises(UsageError, match=message):
        MeasuredTable.read(path).bind(None, space())


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "conv1,dense,1e-3")
    with pytest.raises(UsageError, match="none of the model's layers.*conv1, the model 0, 1"):
        MeasuredTable.read(path).bind(None, space())
