"""The study of the recipe ``fast``: a row for each part, kept when the command is given again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.plugins import load_callable
from rankNAS.search_spaces.zoo.resnet9 import whitening_filters

FILE = Path(__file__).parents[2] / "studies" / "recovery" / "fast.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="not in a checkout")


def data() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    items = TensorDataset(x, torch.arange(48) % 4)
    return items, items


def test_a_row_for_a_part(tmp_path: Path) -> None:
    options = {"images": 32, "width": 2, "batch": 8, "rate": 0.1, "threads": 1, "speed": "plain"}
    args = argparse.Namespace(seconds=3.0, **options)
    run = load_callable(f"{FILE}:run")
    module = run.__globals__
    for part in ("nothing", "whitening"):
        row = run(args, rankNAS.load_data(data()), part, 1)
        assert row["without"] == part and row["seed"] == 1 and row["images"] == 32
        assert 0 <= row["accuracy"] <= 1 and 0 < row["steps"] <= row["planned"]
        module["append"](tmp_path / "fast.csv", module["FIELDS"], row)
    rows = module["rows_of"](tmp_path / "fast.csv")
    assert [row["without"] for row in rows] == ["nothing", "whitening"]
    lines = load_callable(f"{FILE}:table")([*rows, rows[0]]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| nothing | ") and "± 0.00" in lines[2]


def test_rows_that_exist_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, module = tmp_path / "fast.csv", load_callable(f"{FILE}:main").__globals__
    done: list[tuple[str, int]] = []

    def run(args: Any, given: Any, part: str, seed: int) -> dict[str, Any]:
        done.append((part, seed))
        values = {"accuracy": 0.5, "accuracy_plain": 0.5, "seconds": 1.0, "epochs": 1.0}
        return {"without": part, "seed": seed, **values}

    monkeypatch.setitem(module, "run", run)
    monkeypatch.setattr(rankNAS, "load_data", lambda source: None)
    given = ["fast.py", "--data", "none", "--without", "nothing", "sam", "--threads", "1"]
    for seeds in (["0"], ["0", "1"]):
        monkeypatch.setattr(sys, "argv", [*given, "--out", str(out), "--seeds", *seeds])
        module["main"]()
    assert done == [("nothing", 0), ("sam", 0), ("nothing", 1), ("sam", 1)]


def test_the_mean_over_mirrored_images() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    averaged, x = load_callable(f"{FILE}:Mirrored")(network), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(averaged(x), (network(x) + network(x.flip(3))) / 2)
    torch.testing.assert_close(averaged(x), averaged(x.flip(3)))


def test_whitening_is_fitted_to_the_images_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = load_callable(f"{FILE}:run").__globals__, list[nn.Module]()

    def stopped(recipe: Any, job: Any) -> None:
        seen.append(job.network)
        raise KeyboardInterrupt

    monkeypatch.setitem(module, "run_recipe", stopped)
    options = {"images": 48, "width": 2, "batch": 8, "rate": 0.1, "threads": 1, "speed": "plain"}
    args = argparse.Namespace(seconds=3.0, **options)
    with pytest.raises(KeyboardInterrupt):
        module["run"](args, rankNAS.load_data(data()), "nothing", 0)
    filters = whitening_filters([data()[0].tensors[0]]).float()
    torch.testing.assert_close(seen[0].patches.weight, filters, atol=1e-4, rtol=1e-4)
