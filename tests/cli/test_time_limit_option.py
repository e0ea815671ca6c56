"""``--time-limit`` of the commands, by a clock of the tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from clocks import Clock
from safetensors.torch import save_file

from rankNAS.cli import main
from rankNAS.cli.output import ProgressDisplay
from rankNAS.plugins import load_callable

Command = Callable[..., int]


@pytest.fixture
def command(model_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command with more options and gives its exit code."""
    torch.manual_seed(0)
    state = load_callable(model_file)(num_classes=10).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    search = ["search", "--space", model_file, "--weights", "weights.safetensors", "--trials", "3"]
    search += ["--calibration", "200", "--validation", "64", "--budget", "0.5", "--study", "s"]

    def run(name: str, *options: str) -> int:
        words = [*search, "--strategy", "random"] if name == "search" else [name]
        quiet = [] if name in ("show", "report") else ["--quiet"]
        monkeypatch.setattr(sys, "argv", ["ranknas", *words, *options, *quiet])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return run


def ending(patch: pytest.MonkeyPatch, stage: str, count: int = 1) -> None:
    """The time ends in a stage of the next command."""
    clock = Clock(patch).at(stage, count)
    patch.setattr(ProgressDisplay, "stage", lambda self, *a: clock(*a))


def result() -> dict[str, object]:
    found: dict[str, object] = json.loads(Path("ranknas-studies/s/result.json").read_text())
    return found


@pytest.mark.parametrize("value", ["0", "-2", "nan", "inf"])
@pytest.mark.parametrize("name", ["search", "compare", "resume"])
def test_a_wrong_limit_is_one_line(
    command: Command, capfd: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    study = ["s"] if name == "resume" else []
    assert command(name, *study, "--time-limit", value) == 2
    error = capfd.readouterr().err
    assert "`--time-limit` must be a positive number of seconds" in error
    assert len(error.strip().splitlines()) == 1


def test_a_limit_before_the_tables(
    command: Command, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ending(patch, "calibrate")
        assert command("search", "--time-limit", "50", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document == result() and not document["trials"]
    assert "uniform allocation" in document["notes"][0]
    assert "without statistics" in document["notes"][0]
    assert document["solutions"][0]["trial"] is None
    assert document["best"]["macs"] <= 0.5 * document["dense"]["macs"]
    assert {"calibrate", "answer", "test"} <= set(document["cpu_seconds"])
    assert Path(document["artifact"]).is_file()
    assert command("show", "s") == 0
    assert "uniform allocation" in capfd.readouterr().out
    assert command("report", "s") == 0
    # The same study begins where it was left: at its start.
    assert command("resume", "s", "--trust-study") == 0
    assert len(result()["trials"]) == 3 and result()["notes"] == []  # type: ignore[arg-type]


def test_a_limit_during_the_trials_and_a_resumed_search(
    command: Command, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ending(patch, "trials", 2)
        assert command("search", "--time-limit", "50", "--finetune", "1") == 0
    assert len(result()["trials"]) == 2  # type: ignore[arg-type]
    out = capfd.readouterr().out
    assert "the answer is the best trial so far" in out
    assert "ended the fine-tuning for macs<=0.5" in out and "finetuned" not in result()
    assert command("resume", "s", "--trust-study", "--time-limit", "5000") == 0
    assert len(result()["trials"]) == 3 and result()["notes"] == []  # type: ignore[arg-type]
    assert "finetuned" in result()


def test_a_comparison_that_a_limit_ends_goes_on_later(
    command: Command,
    model_file: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--space", model_file, "--weights", "weights.safetensors", "--trials", "3"]
    options += ["--calibration", "64", "--validation", "64", "--budget", "0.5", "--out", "out"]
    options += ["--seeds", "2", "--strategies", "uniform,random"]
    with monkeypatch.context() as patch:
        ending(patch, "trials", 2)
        assert command("compare", *options, "--time-limit", "500") == 0
    out = capfd.readouterr().out
    assert "best trial so far" in out and "not searched: the time limit of 500 s" in out
    assert "Ended by the time limit" in Path("out/summary.md").read_text()
    earlier = pd.read_csv("out/results.csv")
    assert command("compare", *options) == 0
    rows = pd.read_csv("out/results.csv")
    assert rows.note.isna().all() and (rows.status == "ok").all() and len(rows) == 6
    assert rows.search_seconds[1] == earlier.search_seconds[1]  # was not searched again
    assert pd.read_csv("out/differences.csv").seeds.tolist() == [2] * 4
