"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Command
from safetensors.torch import load_file, save_file

from rankNAS.cli import main
from rankNAS.cli.options import SearchOptions, check_name
from rankNAS.models.artifact import read_metadata
from rankNAS.plugins import load_callable
from rankNAS.search_spaces.compiler import count_macs

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ["--calibration", "64", "--validation", "64", "--trials", "3", "--quiet"]


def ranknas(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "rankNAS", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Like `ranknas`, but in this process, which has imported everything already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        code = int(stopped.value.code or 0)
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def weights(model_file: str, tmp_path: Path) -> str:
    """Random weights for the model of `model_file`, with its normalisation in the metadata."""
    torch.manual_seed(0)
    model = load_callable(model_file)(num_classes=10)
    path = tmp_path / "weights.safetensors"
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        path,
        {"input": "RGB/255 normalised by mean (0.5,0.5,0.5), std (0.25,0.25,0.25)"},
    )
    return str(path)


@pytest.fixture
def search(model_file: str, weights: str, tmp_path: Path) -> list[str]:
    return [
        *("search", "--space", model_file, "--weights", weights, "--strategy", "random"),
        *("--budget", "0.6", "--study", "first", *QUICK),
    ]


@pytest.mark.slow
def test_search_show_resume_and_export(
    here: Run, search: list[str], model_file: str, tmp_path: Path
) -> None:
    """One study from start to end; each step needs the one before. The first is a process."""
    done = ranknas(*search, "--json", "--finetune", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {
        *("study", "strategy", "space", "input_shape", "budget", "cost", "dense", "best"),
        *("trials", "seconds", "artifact"),
    } <= set(result)
    assert {"accuracy", "test_accuracy", "macs", "params"} <= set(result["dense"])
    assert {"accuracy", "test_accuracy", "macs", "params", "allocation"} <= set(result["best"])
    assert len(result["trials"]) == 3
    assert result["best"]["macs"] <= 0.6 * result["dense"]["macs"]
    assert result["finetuned"]["epochs"] == 1
    folder = tmp_path / "ranknas-studies" / "first"
    names = {"best.json", "best.safetensors", "finetuned.safetensors", "config.json", "study.db"}
    assert names | {"trials.csv", "result.json"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "best.json").read_text()) == result["best"]["allocation"]
    model = load_callable(model_file)(num_classes=10)
    assert result["dense"]["macs"] == count_macs(model, torch.zeros(1, *result["input_shape"]))

    shown = here("show", "first")
    assert shown.returncode == 0 and "chosen ranks" in shown.stdout
    assert all(layer in shown.stdout for layer in result["best"]["allocation"])
    assert json.loads(here("show", "first", "--json").stdout) == result

    untrusted = here("resume", "first")
    assert untrusted.returncode == 2 and "--trust-study" in untrusted.stderr
    more = here(*("resume", "first", "--trials", "5", "--trust-study", "--json", "--quiet"))
    assert more.returncode == 0, more.stderr
    trials = json.loads(more.stdout)["trials"]
    assert [t["allocation"] for t in trials[:3]] == [t["allocation"] for t in result["trials"]]
    assert len(trials) == 5

    exported = here(*("export", "first", "--format", "pt2", "--space", model_file, "--json"))
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["max_absolute_difference"] < 1e-4


def test_trials_that_train(here: Run, search: list[str]) -> None:
    options = ["--trial-epochs", "2", "--trial-samples", "64", "--early-stopping", "--json"]
    done = here(*search, *options, "--objective", "loss", "--trials", "9")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all("loss@1" in t["metrics"] for t in result["trials"])
    ends = [t for t in result["trials"] if t["state"] == "complete"]
    assert {t["state"] for t in result["trials"]} == {"complete", "pruned"}
    assert all(t["metrics"]["loss@1"] != t["metrics"]["loss"] for t in ends)
    assert result["best"]["loss"] == min(t["metrics"]["loss"] for t in ends)


def test_refined_networks(here: Run, search: list[str], tmp_path: Path) -> None:
    plain = here(*search, "--json")
    refined = here(*search, "--json", "--refine", "--refine-steps", "8", "--study", "second")
    assert refined.returncode == 0, refined.stderr
    first, second = json.loads(plain.stdout), json.loads(refined.stdout)
    assert [t["metrics"] for t in first["trials"]] == [t["metrics"] for t in second["trials"]]
    assert first["best"]["allocation"] == second["best"]["allocation"]
    assert second["best"]["kl_divergence"] != first["best"]["kl_divergence"]
    stored = read_metadata(tmp_path / "ranknas-studies" / "second" / "best.safetensors")
    assert json.loads(stored["metrics"])["accuracy"] == second["best"]["accuracy"]


def test_several_budgets_have_an_answer_each(
    here: Run, search: list[str], model_file: str, tmp_path: Path
) -> None:
    """Searched, shown and exported; then other budgets, in the same study."""
    found = here(*search, "--budget", "params=0.7,0.45")
    assert found.returncode == 0, found.stderr
    folder = tmp_path / "ranknas-studies" / "first"
    result = json.loads((folder / "result.json").read_text())
    labels = ["macs<=0.6,params<=0.7", "macs<=0.6,params<=0.45"]
    assert [a["budget_key"] for a in result["solutions"]] == labels
    assert all(label in found.stdout for label in labels)
    assert len(result["trials"]) == 6
    assert [t["budget_key"] for t in result["trials"]] == [labels[0]] * 3 + [labels[1]] * 3
    assert not any(t["probe"] for t in result["trials"])
    for solution, bound, name in zip(
        result["solutions"],
        (0.7, 0.45),
        ("best-macs-0.6-params-0.7", "best-macs-0.6-params-0.45"),
        strict=True,
    ):
        assert solution["best"]["params"] <= bound * result["dense"]["params"]
        trial = result["trials"][solution["trial"]]
        assert solution["best"]["accuracy"] == trial["metrics"]["accuracy"]
        assert solution["best"]["allocation"] == trial["allocation"]
        assert Path(solution["artifact"]).name == f"{name}.safetensors"
        assert json.loads((folder / f"{name}.json").read_text()) == trial["allocation"]
    first = result["solutions"][0]
    assert {k: result[k] for k in first} == first

    shown = here("show", "first").stdout
    assert [shown.count(f"{label}: trial") for label in labels] == [1, 1]
    assert shown.count("chosen ranks") == 2

    arguments = ("export", "first", "--space", model_file, "--output", "small.safetensors")
    second = ["--budget", "0.6", "--budget", "params=0.45"]
    assert here(*arguments, *second).returncode == 0
    size = sum(t.numel() for t in load_file(tmp_path / "small.safetensors").values())
    assert size <= 0.5 * sum(
        p.numel() for p in load_callable(model_file)(num_classes=10).parameters()
    )
    unknown = here(*arguments, "--budget", "0.6")
    assert unknown.returncode == 2 and "; ".join(labels) in unknown.stderr


def test_resumed_with_another_budget(here: Run, search: list[str], tmp_path: Path) -> None:
    assert here(*search).returncode == 0
    folder = tmp_path / "ranknas-studies" / "first"
    resumed = here(
        *("resume", "first", "--budget", "0.5,0.4", "--trust-study", "--json", "--quiet")
    )
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)
    targets = [t["budget_key"] for t in result["trials"]]
    assert targets == ["macs<=0.6"] * 3 + ["macs<=0.5"] * 3 + ["macs<=0.4"] * 3
    assert [a["budget"] for a in result["solutions"]] == [{"macs": 0.5}, {"macs": 0.4}]
    assert json.loads((folder / "config.json").read_text())["budget"] == ["0.5,0.4"]
    again = here("resume", "first", "--trust-study", "--json", "--quiet")
    assert json.loads(again.stdout)["solutions"] == result["solutions"]
    other = here("resume", "first", "--budget", "params=0.4", "--trust-study")
    assert other.returncode == 2 and "costs was ['macs'], is ['params']" in other.stderr


def test_show_prints_the_front_and_what_is_dominated(
    here: Run, search: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from rankNAS.strategies import Random\n"
        "from rankNAS.strategies.base import Strategy\n"
        "@dataclass(frozen=True)\n"
        "class Probing(Strategy):\n"
        "    name = 'probing'\n"
        "    def probes(self, problem, history):\n"
        "        return [problem.allocation([0] * len(problem.errors))]\n"
        "    def propose(self, problem, history, n, rng):\n"
        "        return Random().propose(problem, history, n, rng)\n"
    )
    changed = ["--strategy", "mine.py:Probing", "--objective", "loss", "--objective", "macs"]
    found = here(*search, *changed, "--trials", "9")
    assert found.returncode == 0 and "9 trials and 1 probes" in found.stdout, found.stderr
    assert not found.stderr
    result = json.loads(here("show", "first", "--json").stdout)
    assert result["trials"][0]["probe"] and 0 not in result["feasible"]
    worst = [max(t["values"][i] for t in result["trials"]) for i in range(2)]
    assert result["reference"] == worst and worst[1] == result["dense"]["macs"]
    shown = here("show", "first").stdout
    assert f"hypervolume {result['hypervolume']:.5g} from the worst values seen" in shown
    assert "1 probes, measured whatever their cost" in shown and "best 9 of 9 trials" in shown
    assert result["dominated_by"]
    for by in result["dominated_by"].values():
        assert f"dominated by {by}" in shown


@pytest.mark.slow
@pytest.mark.xdist_group("cli/test_interrupts.py")  # whose server of processes it needs
def test_killed_and_resumed_equals_uninterrupted(
    here: Run, search: list[str], tmp_path: Path
) -> None:
    arguments = [*search[: search.index("--trials")], "--trials", "40", "--json", "--quiet"]
    whole = here(*arguments, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    command = Command([*arguments, "--out", "cut"], tmp_path)
    database = tmp_path / "cut" / "first" / "study.db"
    while command.ended() is None and finished(database) < 4:
        time.sleep(0.01)
    command.send(signal.SIGKILL)
    assert command.ended(60) == -signal.SIGKILL
    kept = finished(database)
    assert 4 <= kept < 40
    resumed = here(*arguments, "--out", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr

    def essence(text: str) -> list[tuple[object, ...]]:
        return [(t["number"], t["allocation"], t["values"]) for t in json.loads(text)["trials"]]

    assert essence(resumed.stdout) == essence(whole.stdout)
    assert json.loads(resumed.stdout)["best"] == json.loads(whole.stdout)["best"]


def finished(database: Path) -> int:
    if not database.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            (count,) = connection.execute("select count(*) from trials").fetchone()
            return int(count)
    except sqlite3.Error:
        return 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--space", "resnet188"], "Did you mean 'resnet18'"),
        (["--strategy", "bow"], "Did you mean 'bo'"),
        (["--objective", "acuracy"], "Did you mean 'accuracy'"),
        (["--cost", "mac"], "Did you mean 'macs'"),
        (["--budget", "params=0"], "must be in (0, 1]"),
        (["--budget", "0.5"], "given twice"),
        (["--budget", "half"], "a budget must be a fraction"),
        (["--budget", "params=0.5,0.5"], "given twice"),
        (["--budget", "params=0.5,0.0001"], "the smallest possible is"),
        (["--budget", "params=0.0001"], "the smallest possible is"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--data", "parquet:nowhere"], "nowhere"),
        (["--data", "imagnet"], "unknown data source"),
        (["--normalize", "half"], "half"),
        (["--operators", "svd,tucker"], "Did you mean 'tucker2'"),
        (["--metric", "fischer"], "must be one of weight, input, "),
        (["--study", "../escape"], "`--study` must be"),
        (["--trials", "0"], "at least 1, got 0"),
        (["--trial-epochs", "1", "--early-stopping"], "two or more"),
        (["--finetune", "1", "--learning-rate", "0"], "learning_rate is 0.0"),
        (["--hardware", "hots"], "Did you mean 'host'"),
        (["--out", "file/below"], "cannot be written"),
        (["--seed", "-1"], "`--seed` must be from 0 to 4294967295, got -1"),
        (["--seed", 24 * "9"], "`--seed` must be from 0 to 4294967295, got 999"),
        (["--exclude", "("], "`exclude` '(' is no regular expression"),
        (["--device", "banana"], "`device` 'banana' cannot be used"),
        (["--device", "cuda:99"], "`device` 'cuda:99' cannot be used"),
        (["--device", "meta"], "`device` meta holds no values"),
        (["--workers", "2", "--gpus-per-trial", "300"], "need more GPUs than the"),
        (["--gpus-per-trial", "1.5"], "a whole number or a fraction below 1, got 1.5"),
        (["--storage", "sqlite://"], "keeps a study in memory"),
        (["--storage", "sqlite+pysqlite:///:memory:"], "keeps a study in memory"),
        (["--operators", ""], "`operators` is empty"),
        (["--operators", " ,"], "`operators` is empty"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    search: list[str],
    tmp_path: Path,
    change: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    before = [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ranknas", *search, *change])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    unchanged = [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts]
    assert unchanged == before


def test_a_finished_study_is_not_begun_again(here: Run, search: list[str], tmp_path: Path) -> None:
    assert here(*search).returncode == 0
    again = here(*search)
    assert again.returncode == 2 and "add --resume" in again.stderr
    other = here(*search, "--resume", "--budget", "params=0.7")
    assert other.returncode == 2 and "another configuration" in other.stderr
    table = (tmp_path / "ranknas-studies" / "first" / "result.json").read_text()
    assert len(json.loads(table)["trials"]) == 3


def test_an_unnamed_study_gets_a_new_name(here: Run, search: list[str], tmp_path: Path) -> None:
    i = search.index("--study")
    arguments = [*search[:i], *search[i + 2 :], "--json"]
    names = [json.loads(here(*arguments).stdout)["study"] for _ in range(2)]
    assert names == ["my_model.py-factory-random-0.6", "my_model.py-factory-random-0.6-2"]


def test_the_name_of_a_study_of_several_budgets_is_a_safe_folder() -> None:
    budget = ["0.55, 0.5,0.37", "params=0.6"]
    options = SearchOptions(space="a/b.py:net", strategy="bo", budget=budget, out="nowhere")
    name = options.named(resume=False).study
    assert name == "b.py-net-bo-0.55-0.5-0.37-params=0.6"
    check_name(name)


def test_an_objective_that_fails_three_times_stops_with_its_reason(
    here: Run, search: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def broken(network, data):\n    return float('nan')\n")
    stopped = here(*search, "--objective", "mine.py:broken")
    assert stopped.returncode == 2
    assert "3 trials in a row failed" in stopped.stderr and "nan" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_a_long_message_is_shortened_and_printed_once(
    here: Run, search: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def broken(network, data):\n    raise ValueError('begin ' + 5000 * 'x' + ' end')\n"
    )
    stopped = here(*search, "--objective", "mine.py:broken")
    assert stopped.returncode == 2
    told = stopped.stdout + stopped.stderr
    assert told.count("begin xxx") == told.count("xxx end") == 1 and told.count("x") < 1000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["spaces"], "resnet20"),
        (["strategies"], "bo"),
        (["objectives"], "accuracy"),
        (["compile", "--space", "resnet20", "--num-classes", "10"], "output layer"),
        (["--version"], "ranknas"),
        (["search", "--help"], "--budget"),
        (["compare", "--help"], "--strategies"),
    ],
)
def test_listings(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("command", ["spaces", "strategies", "objectives", "compile"])
def test_listings_as_json(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = ["--space", "resnet20"] if command == "compile" else []
    monkeypatch.setattr(sys, "argv", ["ranknas", command, "--json", *space])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)


def test_a_compiled_space_shows_shares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["ranknas", "compile", "--space", "resnet20", *flags])
        with pytest.raises(SystemExit):
            main()
        output = capsys.readouterr().out
        if flags:
            shares = json.loads(output)["shares"].values()
            assert sum(share["macs"] for share in shares) == pytest.approx(1)
            assert sum(share["params"] for share in shares) == pytest.approx(1)
        else:
            assert "norm: no matrix" in output and "(19 modules)" in output
            assert "(98." in output


def test_unknown_studies_are_named(here: Run, tmp_path: Path) -> None:
    for command in ("show", "resume", "export", "dashboard"):
        failed = here(command, "none")
        assert failed.returncode == 2 and "there is no study 'none'" in failed.stderr
