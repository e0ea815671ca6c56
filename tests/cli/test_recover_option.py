"""``--recover`` of search, resume and compare, and the list of recipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from clocks import Clock
from safetensors.torch import save_file

import rankNAS
from rankNAS.cli import main
from rankNAS.cli.output import ProgressDisplay
from rankNAS.cli.results import _worse
from rankNAS.plugins import load_callable
from rankNAS.recovery.recipe import RECIPES

Command = Callable[..., tuple[int, str, str]]
FEW = "samples=64,batch=32,speed=plain"


@pytest.fixture
def command(
    model_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """Runs a command with more options; its exit code, what it prints and its errors."""
    torch.manual_seed(0)
    state = load_callable(model_file)(num_classes=10).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    common = ["--space", model_file, "--weights", "weights.safetensors", "--trials", "2"]
    common += ["--calibration", "64", "--validation", "64", "--budget", "0.5", "--quiet"]
    own = {
        "search": [*common, "--study", "s", "--strategy", "uniform"],
        "compare": [*common, "--strategies", "uniform,energy", "--seeds", "1", "--out", "out"],
        "resume": ["s", "--trust-study", "--quiet"],
    }

    def run(name: str, *options: str) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ranknas", name, *own.get(name, []), *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("ranknas-studies/s/result.json").read_text())
    return found


def test_a_search_recovers_its_answers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, _ = command("search", "--recover", f"distil:epochs=2,{FEW}")
    assert code == 0 and "recovered, test accuracy" in printed
    (solution,) = result()["solutions"]
    tuned = solution["finetuned"]
    assert tuned["recipe"].startswith("distil:epochs=2") and tuned["steps"] == 4
    assert not tuned["stopped"] and Path(tuned["artifact"]).is_file()
    assert solution["artifact"] == tuned["artifact"] != solution["best"].get("artifact")
    assert "recover" in result()["cpu_seconds"]
    # The same search goes on without training again, and another recipe is another training.
    assert command("resume")[0] == 0
    assert result()["solutions"][0]["finetuned"]["test_loss"] == tuned["test_loss"]
    assert command("resume", "--recover", f"lora:epochs=1,{FEW}")[0] == 0
    (later,) = result()["solutions"]
    assert later["finetuned"]["recipe"].startswith("lora:epochs=1")
    assert later["finetuned"]["test_loss"] != tuned["test_loss"]
    assert later["best"] == solution["best"]


@pytest.mark.parametrize(
    ("direction", "after", "worse"),
    [
        ("maximize", 0.7, True),
        ("maximize", 0.899, False),
        ("minimize", 0.7, False),
        ("minimize", 0.95, True),
    ],
)
def test_a_training_that_makes_a_network_worse(direction: str, after: float, worse: bool) -> None:
    task = SimpleNamespace(main_metric="metric", directions={"metric": direction})
    solution = {"budget_key": "macs<=0.3", "best": {"metric": 0.9}, "finetuned": {"metric": after}}
    solution["artifact"] = "out/finetuned-macs-0.3.safetensors"
    untrained = {"budget_key": "macs<=0.5", "best": {"metric": 0.9}, "artifact": "best"}
    notes = _worse(SimpleNamespace(task=task), [untrained, solution])  # type: ignore[arg-type]
    assert len(notes) == worse
    assert all(f"then {after:.4g}); the one before it is 'out/best-macs-0.3" in n for n in notes)


def test_finetune_is_the_recipe_plain(command: Command) -> None:
    assert command("search", "--finetune", "1")[0] == 0
    tuned = result()["solutions"][0]["finetuned"]
    assert tuned["recipe"].startswith("plain:epochs=1") and tuned["epochs"] == 1
    text = tuned["recipe"] + ",speed=plain"
    assert command("resume", "--recover", text)[0] == 2  # both are given
    assert "finetune" in result()["cpu_seconds"]


def test_a_loss_that_is_not_finite_keeps_the_answer(command: Command) -> None:
    recipe = f"plain:epochs=3,lr=1e20,clip=none,{FEW}"
    code, _, error = command("search", "--recover", recipe)
    assert code == 2 and len(error.strip().splitlines()) == 1
    assert "the loss is" in error and "in epoch" in error and "are kept" in error
    (solution,) = result()["solutions"]
    assert "finetuned" not in solution and "the loss is" in solution["failed"]
    assert Path(solution["artifact"]).is_file() and solution["best"]["test_loss"] > 0
    assert command("resume", "--recover", f"plain:epochs=1,{FEW}")[0] == 0
    assert "finetuned" in result()["solutions"][0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("swiftlearn:epochs=3,keep=0.001", "the subset of the 64 samples is empty"),
        ("greedylore:epochs=1,processes=33", "33 processes are more than the 32 samples"),
    ],
)
def test_what_cannot_be_trained_keeps_the_answer(
    command: Command, recipe: str, message: str
) -> None:
    code, _, error = command("search", "--recover", f"{recipe},{FEW}")
    assert code == 2 and len(error.strip().splitlines()) == 1 and message in error
    (solution,) = result()["solutions"]
    assert "finetuned" not in solution and Path(solution["artifact"]).is_file()


def test_a_search_recovers_in_two_processes(command: Command) -> None:
    """The network is of a file, which the other process has to import."""
    code, printed, error = command("search", "--recover", f"greedylore:epochs=1,{FEW}")
    assert code == 0 and "recovered, test accuracy" in printed and not error
    assert result()["solutions"][0]["finetuned"]["steps"] == 2


def test_each_member_of_a_family_is_saved(command: Command, model_file: str) -> None:
    recipe = f"progressive:epochs=3,members=3,{FEW}"
    assert command("search", "--operators", "svd", "--recover", recipe)[0] == 0
    tuned = result()["solutions"][0]["finetuned"]
    params = [member["params"] for member in tuned["members"]]
    assert len(params) == 3 and params == sorted(params, reverse=True) and params[0] > params[2]

    def factory() -> Any:
        return load_callable(model_file)(num_classes=10)

    for member in tuned["members"]:
        network = rankNAS.load(member["artifact"], factory)
        assert sum(p.numel() for p in network.parameters()) == member["params"]
        assert member["loss"] > 0


def test_a_time_limit_keeps_the_best_weights(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = f"distil:epochs=9,{FEW}"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "stage", lambda self, *a: Clock(patch).at("recover", 3)(*a))
        code, printed, _ = command("search", "--recover", recipe, "--time-limit", "50")
    assert code == 0 and "the time ended the recovery for macs<=0.5" in printed
    tuned = result()["solutions"][0]["finetuned"]
    assert tuned["stopped"] and tuned["steps"] == 3
    assert command("resume")[0] == 0  # without a limit, from where it was
    later = result()["solutions"][0]["finetuned"]
    assert not later["stopped"] and later["steps"] == 18 and result()["notes"] == []


@pytest.mark.parametrize("name", ["search", "compare"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recover", "distill"], "Did you mean 'distil'"),
        (["--recover", "distil:epoch=1"], "Did you mean 'epochs'"),
        (["--recover", "distil", "--finetune", "1"], "--recover plain:epochs=1"),
        (["--recover", "distil:epochs=0"], "epochs is 0"),
    ],
)
def test_bad_recipes_are_one_line_before_any_work(
    command: Command, name: str, options: list[str], message: str
) -> None:
    code, _, error = command(name, *options)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not Path("ranknas-studies").exists() and not Path("out").exists()


def test_a_comparison_recovers_all_alike(command: Command) -> None:
    code, _, _ = command("compare", "--recover", f"distil:epochs=1000,seconds=1,{FEW}")
    assert code == 0
    rows = pd.read_csv("out/results.csv")
    tuned = rows[rows.strategy != "dense"]
    assert tuned.finetuned_test.notna().all() and rows.note.isna().all()
    summary = Path("out/summary.md").read_text()
    assert "Recovery: distil:epochs=1000" in summary and "seconds=1.0" in summary


def test_a_comparison_says_what_could_not_be_recovered(command: Command) -> None:
    recipe = f"plain:epochs=3,lr=1e20,clip=none,{FEW}"
    assert command("compare", "--recover", recipe)[0] == 0
    rows = pd.read_csv("out/results.csv")
    failed = rows[rows.strategy != "dense"]
    assert failed.finetuned_test.isna().all() and failed.test.notna().all()
    assert failed.note.str.contains("the loss is").all()


def test_the_list_of_recipes(command: Command) -> None:
    code, printed, _ = command("recipes", "--json")
    rows = json.loads(printed)
    assert code == 0 and [row["name"] for row in rows] == list(RECIPES)
    assert "epochs=20" in rows[1]["options"] and "ema=" in rows[1]["options"]
    code, printed, _ = command("recipes")
    assert code == 0 and "(all)" in printed and "as distil; period=1 " in printed
    assert "as msr; penalty=stable" in printed and printed.count("augmentations=4") == 1
