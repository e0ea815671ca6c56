"""The roofline and the device files it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import Device, Roofline, device_names, make_hardware
from rankNAS.hw_models.devices import read_device
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.testing import HardwareContract

CONTENT: dict[str, Any] = {
    "name": "board",
    "bandwidth": 1e9,
    "launch": 1e-5,
    "peak": {"float32": 1e9, "float16": 4e9},
    "tile": {"float16": [8, 16]},
    "energy": {"byte": 1e-10, "float32": 1e-12},
}
SHIPPED = {
    "v100",
    "a100",
    "h100",
    "jetson_tx2",
    "jetson_orin",
    "ascend910",
    "ascend310",
    "cpu2",
}


def board(**changes: Any) -> Device:
    return Device.of(CONTENT | changes, "'board.toml'")


class TestRoofline(HardwareContract):
    hardware = Roofline(board(peak={"float32": 1e9, "float64": 5e8}))


def linear(M: int, N: int, K: int, itemsize: int = 4) -> LayerShape:
    return LayerShape(K, N, calls=((M,),), itemsize=itemsize)


def test_arithmetic_bound() -> None:
    seconds, sigma = Roofline(board()).stage(linear(100, 100, 100))
    assert seconds == pytest.approx(1e-5 + 2 * 100**3 / 1e9)
    assert sigma == pytest.approx(0.3 * seconds)


def test_memory_bound() -> None:
    seconds, _ = Roofline(board()).stage(linear(1, 100, 100))
    assert seconds == pytest.approx(1e-5 + 4 * (100 + 100 + 100 * 100) / 1e9)


def test_tiles_are_filled_up() -> None:
    model = Roofline(board(bandwidth=1e15))
    seconds, _ = model.stage(linear(100, 9, 17, itemsize=2))
    assert seconds == pytest.approx(1e-5 + 2 * 100 * 16 * 32 / 4e9)
    grouped = LayerShape(34, 18, groups=2, calls=((100,),), itemsize=2)
    assert model.stage(grouped)[0] == pytest.approx(1e-5 + 2 * 2 * 100 * 16 * 32 / 4e9)


def test_energy() -> None:
    shape = linear(10, 20, 30)
    found = Roofline(board()).stage_energy(shape)
    assert found == pytest.approx(6000e-12 + 4 * (300 + 200 + 600) * 1e-10)
    assert Roofline(board()).stage_energy(linear(10, 20, 30, 2)) is None
    assert Roofline(board(energy={})).stage_energy(shape) is None


def test_what_is_outside_the_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    space = compile_space(model, torch.zeros(5, 64), min_weights=1)
    assert len(space.skipped) == 1  # the output layer
    seconds, _ = Roofline(board()).remainder_cost(space)
    assert seconds == pytest.approx(1e-5 + 2 * 5 * 640 / 1e9)


def test_a_dtype_without_figures() -> None:
    with pytest.raises(UsageError, match="board has no figures for float64.*float32, float16"):
        Roofline(board()).stage(linear(1, 1, 1, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": None}, "has no 'bandwidth'"),
        ({"bandwidth": -1.0}, "'bandwidth' must be a positive number, got -1.0"),
        ({"launch": "fast"}, "'launch' must be a positive number"),
        ({"launch": True}, "'launch' must be"),
        ({"peak": {}}, "has no .peak."),
        ({"peak": 3}, "'peak' must be a table"),
        ({"peak": {"float32": 0}}, "'peak.float32'"),
        ({"peak": {"float32": float("nan")}}, "'peak.float32'"),
        ({"tile": {"float32": [8]}}, "tile.float32 must be two numbers"),
        ({"tile": {"float32": [8, 0]}}, "'tile.float32'"),
        ({"energy": {"byte": -1}}, "'energy.byte'"),
    ],
)
def test_wrong_figures_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        board(**changes)
    assert "board.toml" in str(caught.value)


def test_no_overhead_is_allowed() -> None:
    assert board(launch=0).launch == 0


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_devices_have_a_source_for_every_figure(name: str) -> None:
    assert name in device_names()
    kind, content = read_device(name)
    device = Device.of(content, name)
    assert kind == "roofline" and set(device.peak) <= {"float32", "float16", "bfloat16", "int8"}
    figures = {"bandwidth", "launch"}
    for table in ("peak", "tile", "energy"):
        figures |= {f"{table}.{key}" for key in content.get(table, {})}
    assert figures <= set(device.sources)
    for source in device.sources.values():
        assert source["text"] and (source.get("url") or source.get("assumption"))
    model = make_hardware(name)
    assert isinstance(model, Roofline) and model.name == name


def test_files_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("bandwidth = 1e9\nlaunch = 0\n[peak]\nfloat32 = 1e9\n")
    model = make_hardware(str(path))
    assert isinstance(model, Roofline) and model.name == "mine"
    path.write_text('kind = "systolic"\nrows = 16\nfrequency = 1e9\n')
    assert "rows=16" in repr(make_hardware(str(path)))
    path.write_text('kind = "imc"\nrows = 64\nmapping = "sdk"\nname = "chip"\n')
    assert make_hardware(str(path)).name == "chip"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bandwidth = ", "is not TOML"),
        ('kind = "gpu"', "is of the kind 'gpu'; expected roofline, systolic or imc"),
        ("kind = 3", "`kind` must be text"),
        ('kind = "imc"\nrow = 3', "has 'row'; imc has rows, columns"),
        ('kind = "imc"\nrows = "many"', "'rows' must be a number"),
        ('kind = "systolic"\nfrequency = -1.0', "`frequency` must be a positive number"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        make_hardware(str(path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", b"a = " + b"[" * 100_000, b"\0", b""])
def test_files_of_something_else_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.toml"):
        make_hardware(str(path))


def test_files_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"device file 'none.toml' cannot be read"):
        make_hardware("none.toml")
