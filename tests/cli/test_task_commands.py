"""Searches of networks that are no classifiers, run in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from rankNAS.cli import main
from rankNAS.plugins import load_callable
from rankNAS.tasks import TASKS

Run = Callable[..., tuple[int, str, str]]
FILE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    sizes = [(16, 64), (64, 64), (64, 3)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1])

def _pair(rows):
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        return x, network()(x) * 4

def real():
    return _pair(100), _pair(60)

def untested():
    return list(zip(*_pair(100)))

def unlabelled():
    return _pair(100)[0], _pair(60)[0]
"""


@pytest.fixture
def search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs a short search with more options; gives its exit code and what it printed."""
    (tmp_path / "mine.py").write_text(FILE)
    network = load_callable(f"{tmp_path / 'mine.py'}:network")()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*options: str, command: str = "search") -> tuple[int, str, str]:
        capfd.readouterr()
        fixed = [command, "--space", "mine.py:network", "--trials", "2", "--budget", "0.5"]
        fixed += ["--weights", "weights.safetensors"] if "--untrained" not in options else []
        given = [option for option in options if option != "--untrained"]
        monkeypatch.setattr(sys, "argv", ["ranknas", *fixed, *given])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def names(document: dict[str, Any]) -> set[str]:
    return {name.removeprefix("test_") for name in document if name.startswith("test_")}


def test_a_regression_is_trained_searched_and_shown(search: Run) -> None:
    named = ["--data", "mine.py:real", "--study", "first"]
    code, printed, error = search(*named, "--untrained", "--finetune", "1", "--json")
    assert code == 0, error
    assert "task: regression" in error
    result = json.loads(printed)
    assert result["task"] == "regression" and result["objectives"] == ["r2"]
    assert result["metrics"][0] == "r2" and result["num_classes"] is None
    for network in (result["dense"], result["best"]):
        assert names(network) == set(result["metrics"]) <= set(network)
    assert {"r2", "test_r2"} <= set(result["finetuned"])
    assert result["dense"]["test_r2"] > 0.5

    for command in ("show", "report"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ranknas", command, "first"])
            with pytest.raises(SystemExit) as stopped:
                main()
        assert not stopped.value.code
    page = Path("ranknas-studies/first/report.html").read_text()
    assert "R2 is on the validation samples" in page and "test r2, fine-tuned" in page


def test_the_table_has_the_metrics_of_the_task(search: Run) -> None:
    code, printed, error = search("--data", "mine.py:real", "--quiet")
    assert code == 0, error
    assert "test r2" in printed and "accuracy" not in printed


def test_without_labels_outputs_are_matched(search: Run) -> None:
    code, printed, error = search("--data", "mine.py:unlabelled", "--finetune", "1", "--json")
    assert code == 0, error
    result = json.loads(printed)
    assert result["task"] == "matching" and result["metrics"] == ["distance"]
    assert result["dense"]["test_distance"] == pytest.approx(0, abs=1e-6)
    assert {"distance", "test_distance"} <= set(result["finetuned"])


def test_without_test_data_nothing_is_tested(search: Run) -> None:
    data = ["--data", "mine.py:untested"]
    code, printed, error = search(*data, "--finetune", "1", "--study", "s", "--quiet")
    assert code == 0, error
    assert "r2" in printed and "test" not in printed
    result = json.loads(Path("ranknas-studies/s/result.json").read_text())
    assert not names(result["dense"]) and not names(result["best"])
    assert "r2" in result["finetuned"] and not names(result["finetuned"])
    options = ["--strategies", "uniform", "--seeds", "1", "--out", "out", "--quiet"]
    code, printed, error = search(*data, *options, command="compare")
    assert code == 0, error
    assert "validation r2" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "digits", "--task", "regression"], "fails on the first batch"),
        (["--data", "mine.py:real", "--task", "classification"], "classification"),
        (["--data", "mine.py:real", "--task", "regresion"], "Did you mean 'regression'"),
        (["--data", "mine.py:real", "--objective", "accuracy"], "is no metric of this data"),
        (["--data", "mine.py:unlabelled", "--untrained"], "has no labels to train"),
        (["--data", "mine.py:real", "--space", "resnet18"], "are no classes"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    search: Run, tmp_path: Path, change: list[str], message: str
) -> None:
    code, _, error = search(*change, "--quiet")
    assert code == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "ranknas-studies").exists()


def test_tasks_are_listed_without_torch() -> None:
    program = (
        "import sys; from rankNAS.cli import main; sys.argv = ['ranknas', 'tasks', '--json']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {*TASKS} <= {row["name"] for row in json.loads(done.stdout)}
