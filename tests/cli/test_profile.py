"""``ranknas profile`` and ``ranknas hardware``, run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from language import tiny_llama
from PIL import Image

from rankNAS.cli import main
from rankNAS.cli.commands.profile import draw
from rankNAS.hw_models import Host, device_names, host, validation
from rankNAS.hw_models.timing import DriftMonitor

Command = Callable[..., int]
MODEL = """
import torch
from torch import nn


def net(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ranknas and gives its exit code."""
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ranknas", *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        torch.set_num_threads(threads)
        return int(stopped.value.code or 0)

    return run


FIXED = ["profile", "--space", "mine.py:net", "--image-size", "8", "--candidates", "12"]


@pytest.mark.slow
def test_a_profile_is_measured_validated_and_used(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def monitor(*networks: Any, rounds: int, **options: Any) -> DriftMonitor:
        assert rounds > 20  # which are enough where nobody asks how exact the times are
        return DriftMonitor(*networks, rounds=20, **options)

    monkeypatch.setattr(host, "DriftMonitor", monitor)
    more = ["--out", "board.json", "--shapes", "12", "--validate", "3", "--seconds", "0"]
    assert command(*FIXED, *more, "--threads", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == "board.json" and document["shapes_measured"] >= 12
    assert document["predicted_dense"] > 0
    rows = pd.read_csv(tmp_path / "board-validation.csv")
    assert rows.name.tolist() == ["dense", "dense", "random 0", "random 1", "random 2"]
    found = document["validation"]
    assert 0 <= found["within"] <= 1 and 0 <= found["matched"] <= 1
    assert found["slowness"] > 0
    with Image.open(tmp_path / "board-validation.png") as picture:
        assert picture.size[0] > 300
    # Again, on the table: nothing is measured, and predictions are the same.
    assert command(*FIXED, "--hw", "board.json", "--threads", "1", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["predicted_dense"] == pytest.approx(document["predicted_dense"], rel=1e-6)
    assert command(*FIXED, "--hw", "board.json", "--threads", "1") == 0
    printed = capsys.readouterr().out
    assert "mine.py:net on board.json, batch size 1" in printed and "ms" in printed


def test_any_hardware_model_can_be_validated(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--hw", "cpu2", "--batch", "2", "--validate", "2", "--seconds", "0"]
    assert command(*FIXED, *more) == 0
    printed = capsys.readouterr()
    for text in ("within 10 %", "of 2", "rank correlation", "noise: dense against itself"):
        assert text in printed.out
    assert "validate" in printed.err and "profile's speed" not in printed.out


def test_an_interruption_keeps_what_was_measured(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Host, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Host, "_measure", interrupted)
    assert command(*FIXED, "--out", "board.json") == 130
    assert "what was measured is kept" in capsys.readouterr().err


def test_an_interrupted_validation_keeps_the_allocations_so_far(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured, calls = validation._visit, []

    def visit(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(validation, "_visit", visit)
    more = ["--hw", "cpu2", "--validate", "10", "--seconds", "0"]
    assert command(*FIXED, *more) == 130
    rows = pd.read_csv(tmp_path / "ranknas-profile-validation.csv")
    assert rows.name.tolist() == ["dense", "dense", *(f"random {i}" for i in range(8))]
    printed = capsys.readouterr()
    assert "of 8" in printed.out and "interrupted" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["--threads", "0"], "`--threads` must be at least 1"),
        (["--out", "board.txt"], "`--out` must end in .json"),
        (["--hw", "cpu2", "--out", "b.json"], "'cpu2' measures nothing"),
        (["--hw", "cpu3"], "unknown hardware model 'cpu3'"),
        (["--hw", "none.json"], "device file 'none.json' does not exist"),
        (["--study", "none"], "there is no study 'none'"),
    ],
)
def test_wrong_options(
    command: Command, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*FIXED, *options) == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split()) and "Traceback" not in printed.err


def test_the_list_of_hardware(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("hardware", "--json") == 0
    listed = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert {"host", "systolic", "imc", *device_names()} <= set(listed)


def test_the_picture_shows_every_allocation() -> None:
    columns = {"predicted": 1e-3, "measured": 1.1e-3, "sigma": 1e-5, "deviation": 1e-5}
    rows = pd.DataFrame([columns] * 5)
    axes = draw(rows).axes[0]
    points = [len(line[0].get_xdata()) for line in axes.containers]
    assert points == [3, 2]


def test_a_profile_of_one_token(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board.py").write_text(
        "def board(layer, choice):\n    return layer[choice].macs\n"
    )
    tiny_llama(positions=16).save_pretrained(tmp_path / "model")
    found = []
    for more in ([], ["--tokens", "1"]):
        capfd.readouterr()
        given = ["profile", "--space", "hf:model", "--hw", "board.py:board", "--json", "--quiet"]
        assert command(*given, *more) == 0
        found.append(json.loads(capfd.readouterr().out)["predicted_dense"])
    assert found[0] == 16 * found[1]
