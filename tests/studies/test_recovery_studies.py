"""The studies of swiftlearn and of compressed gradients, on a few samples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rankNAS.plugins import load_callable
from rankNAS.recovery.swiftlearn import SwiftLearn

FOLDER = Path(__file__).parents[2] / "studies" / "recovery"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not in a checkout")


def test_windows_of_a_text_are_classified_on_fewer_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [
        f"word{piece} and{n % 7} then{piece + n % 3} " for piece in range(3) for n in range(200)
    ]
    (tmp_path / "train.txt").write_text("".join(pieces))
    file = f"{FOLDER}/swiftlearn.py"
    train, test = load_callable(f"{file}:windows")(tmp_path, 3, 6, 0)
    assert (
        len(train) == 240 and len(test) == 60 and train.tensors[1].unique().tolist() == [0, 1, 2]
    )
    made = load_callable(f"{file}:rows")(10, [0.5])
    assert [type(r) is SwiftLearn and r.keep for r in made.values()][2:] == [0.5] * 4
    options = ["--text", tmp_path, "--classes", "3", "--window", "6", "--epochs", "2"]
    options += ["--seeds", "1", "--kept", "0.5", "--out", tmp_path / "out.csv"]
    monkeypatch.setattr(sys, "argv", ["swiftlearn.py", *map(str, options)])
    load_callable(f"{file}:main")()
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == 6 and table.accuracy.between(0, 100).all()
    assert "| gradient, weighted |" in capsys.readouterr().out
    (tmp_path / "train.txt").write_text("too short")
    with pytest.raises(SystemExit, match="too few words"):
        load_callable(f"{file}:windows")(tmp_path, 3, 6, 0)


def test_traffic_is_counted_for_all_methods_alike(tmp_path: Path) -> None:
    options: dict[str, Any] = {"processes": 1, "seeds": 1, "epochs": 2, "batch": 128}
    args = argparse.Namespace(**options, width=64, period=100, ranks=[4])
    load_callable(f"{FOLDER}/gradients.py:work")(0, args, str(tmp_path))
    table = pd.read_csv(tmp_path / "result.csv")
    assert list(table.method) == ["all-reduce", "PowerSGD", "GreedyLore"] and table.equal.all()
    whole, *others = table.bytes
    assert whole == 4 * (3 * 65 * 64 + 65 * 10) and all(bytes < whole for bytes in others)
    assert "| GreedyLore | 4 |" in load_callable(f"{FOLDER}/gradients.py:summary")(table)
