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


def test_the_rate_of_a_recipe_is_measured_beside_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row for each loop; the ratio of the plain loop to itself is 1."""
    options = "--batch 2 --size 8 --repeats 2 --recipe distil:augmentations=2"
    monkeypatch.setattr(sys, "argv", ["rate.py", *options.split()])
    load_callable(f"{FOLDER}/rate.py:main")()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    kinds = [row[1].strip() for row in rows[2:]]
    assert kinds == [
        "plain loop",
        "recipe, the dense network runs",
        "recipe, its outputs are kept",
    ]
    assert rows[2][3].strip() == "1.000 (1.000 to 1.000)"
    assert all(float(row[2]) > 0 for row in rows[2:])


def test_the_epoch_at_which_a_curve_reaches_a_target() -> None:
    """Of a curve that follows the law a - b e^-c exactly, e = (b / (a - target))^(1 / c)."""
    reached = load_callable(f"{FOLDER}/recipes.py:reached")
    curve = [0.9 - 0.1 * epoch**-0.5 for epoch in range(1, 11)]
    assert reached(curve, 0.88) == pytest.approx(25, rel=1e-3)
    assert reached(curve, 0.9001) == float("inf")


def test_which_networks_are_trained_by_which_recipes() -> None:
    """Each budget by each recipe, the dense network by those that do not need ranks."""
    options: dict[str, Any] = {"space": "resnet20", "recipes": ["distil", "msr"], "epochs": None}
    args = argparse.Namespace(**options, seconds=[300.0], kept=[0.278, 1.0])
    rows = load_callable(f"{FOLDER}/recipes.py:wanted")(args, 0)
    assert [(row["recipe"], row["kept"], row["seconds"]) for row in rows] == [
        ("distil", "0.278", "300"),
        ("distil", "1.0", "300"),
        ("msr", "0.278", "300"),
    ]
