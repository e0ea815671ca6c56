"""``ranknas compare``, run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rankNAS import strategies
from rankNAS.cli import main
from rankNAS.plugins import load_callable

Command = Callable[..., int]


@pytest.fixture
def compare(
    model_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the command with more options and gives its exit code."""
    torch.manual_seed(0)
    state = load_callable(model_file)(num_classes=10).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    fixed = ["ranknas", "compare", "--space", model_file, "--weights", "weights.safetensors"]
    fixed += ["--calibration", "64", "--validation", "64", "--trials", "2", "--out", "out"]
    fixed += ["--seeds", "1", "--strategies", "uniform,random"]

    def run(*options: str) -> int:
        budgets = [] if "--budget" in options else ["--budget", "0.6,0.4"]
        monkeypatch.setattr(sys, "argv", [*fixed, *budgets, *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return run


def test_rows_summary_and_picture(
    compare: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tuning = ["--finetune", "1", "--finetune-samples", "64", "--learning-rate", "0.001"]
    assert compare(*tuning, "--json") == 0
    printed = capfd.readouterr()
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert rows.strategy.tolist() == ["dense", "uniform", "uniform", "random", "random"]
    assert (rows.status == "ok").all()
    assert rows.finetuned_test.notna().tolist() == [False] + [True] * 4
    document = json.loads(printed.out)
    assert [r["test"] for r in document] == rows.test.tolist()
    assert document[0]["finetuned_test"] is None
    assert "seed 0  random  macs<=0.4  test" in printed.err and "factorise" in printed.err
    found = pd.read_csv(tmp_path / "out" / "differences.csv")
    assert set(found.quantity) == {"accuracy", "kl_divergence", "finetuned accuracy"}
    assert len(found) == 4 * 3 and (found.low <= found.high).all()
    assert set(document[1]["to_best"]) == set(found.quantity) and document[0]["to_best"] == {}
    assert (tmp_path / "out" / "summary.tex").read_text().count("tabular") == 4
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "test items" in summary and "accuracy, % to the best" in summary
    assert "    ranknas compare --space" in summary and "## macs<=0.4" in summary
    assert "1 epochs on 64 samples" in summary
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.format == "PNG"


def test_rows_that_are_there_are_not_searched_again(
    compare: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "out" / "results.csv"
    assert compare("--quiet") == 0
    first = results.read_text()
    assert "macs<=0.6" in capfd.readouterr().out
    assert compare("--quiet") == 0
    assert results.read_text() == first
    assert compare("--quiet", "--seeds", "2", "--strategies", "uniform,random,energy") == 0
    rows = pd.read_csv(results)
    assert results.read_text().startswith(first)  # seconds too
    assert rows.groupby("seed").strategy.nunique().tolist() == [4, 4]
    assert not rows.duplicated(["strategy", "budget", "seed"]).any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["seeds"] == 2
    capfd.readouterr()
    assert compare("--trials", "3") == 2
    error = capfd.readouterr().err
    assert "trials was 2, is 3" in error and len(error.strip().splitlines()) == 1
    results.write_text("nonsense\n1\n")
    assert compare() == 2
    assert "is damaged" in capfd.readouterr().err


def test_all_are_all_that_are_listed(
    compare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {name: strategies.STRATEGIES[name] for name in ("energy", "uniform")}
    monkeypatch.setattr("rankNAS.cli.commands.compare.STRATEGIES", listed)
    assert compare("--quiet", "--strategies", "all", "--budget", "0.5") == 0
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert rows.strategy.tolist() == ["dense", "energy", "uniform"]


def test_a_refusal_is_printed_and_kept(
    compare: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from rankNAS.exceptions import UsageError\n"
        "from rankNAS.strategies.base import Strategy\n"
        "@dataclass(frozen=True)\n"
        "class Picky(Strategy):\n"
        "    name = 'picky'\n"
        "    def check(self, request):\n"
        "        raise UsageError('needs another budget.')\n"
        "    def propose(self, problem, history, n, rng):\n"
        "        return []\n"
    )
    assert compare("--quiet", "--strategies", "mine.py:Picky") == 0
    assert "mine.py:Picky: needs another budget." in capfd.readouterr().out
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert rows.status.tolist() == ["needs another budget."] * 2
    assert not (tmp_path / "out" / "comparison.png").exists()
    assert "needs another budget." in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--strategies", "uniform,bow"], "Did you mean 'bo'"),
        (["--strategies", "uniform,uniform"], "different names"),
        (["--budget", "0.0001"], "the smallest possible is"),
        (["--budget", "0.5,0.5"], "given twice"),
        (["--seeds", "0"], "`--seeds` must be at least 1, got 0"),
        (["--finetune", "1", "--distill", "2"], "distill"),
        (["--out", "weights.safetensors/below"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    compare: Command,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    assert compare(*change, "--quiet") == 2
    error = capfd.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
