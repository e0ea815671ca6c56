"""Files of version 0.1 load, show, report and export; what cannot go on says how to go on.

`fixtures/version_0_1` holds the files as that version wrote them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import optuna
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rankNAS
from rankNAS.cli import main
from rankNAS.exceptions import StudyError, WeightsError
from rankNAS.hw_models.profiles import Profile
from rankNAS.io.files import read_json, write_json
from rankNAS.io.formats import UPGRADES, current_format, format_of, upgraded
from rankNAS.models.artifact import read_metadata
from rankNAS.plugins import load_callable
from rankNAS.storage.backends import open_storage
from rankNAS.storage.store import CHOICES, StudyStore

OLD = Path(__file__).parent / "fixtures" / "version_0_1"
factory = load_callable(f"{OLD / 'my_model.py'}:factory")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    return folder


def ranknas(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["ranknas", *arguments])
        main()
    out, error = capsys.readouterr()
    return int(stopped.value.code or 0), out, error


def stored(folder: Path) -> StudyStore:
    """The trials of the study in a copy."""
    storage = open_storage(f"sqlite:///{folder / 'finished' / 'study.db'}")
    study = optuna.load_study(study_name="finished", storage=storage)
    return StudyStore(study, storage, study.user_attrs[CHOICES])


# ------------------------------------------------------------------------------- the table


def test_the_format_is_a_number_from_one_to_the_current_one() -> None:
    for kind in UPGRADES:
        assert format_of(kind, None, "it") == 1
        assert format_of(kind, current_format(kind), "it") == current_format(kind) >= 2
        for wrong in (0, -1, True, "x", "", "²", 1.5, [1]):
            with pytest.raises(StudyError, match="it has the format .*; expected a number from 1"):
                format_of(kind, wrong, "it")
        with pytest.raises(StudyError, match="it was written by a newer version .* format 99"):
            format_of(kind, 99, "it")


def test_results_from_before_tasks_are_those_of_classifiers() -> None:
    found = upgraded("result", {"format": 2, "study": "s"}, "it")
    assert found["task"] == "classification" and found["metrics"][0] == "accuracy"
    assert upgraded("result", {**found, "task": "regression"}, "it")["task"] == "regression"


def test_the_current_format_is_left_as_it_is() -> None:
    for kind in UPGRADES:
        content = {"format": current_format(kind), "metric": 1, "target": 2, "answers": 3}
        assert upgraded(kind, content, "it") == content


def test_an_upgrade_keeps_the_order_and_unknown_entries() -> None:
    content = {"trials": 4, "metric": "input", "objective": ["agreement=minimize", "macs"], "x": 1}
    found = upgraded("options", content, "it")
    assert list(found) == ["trials", "norm", "objective", "x", "format"]
    assert found["objective"] == ["kl_divergence=minimize", "macs"]
    assert content["metric"] == "input"


# -------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ["best-macs-0.8", "finetuned-macs-0.7"])
def test_a_network_loads_with_its_weights_and_metrics(name: str) -> None:
    path = OLD / "finished" / f"{name}.safetensors"
    network = rankNAS.load(path, lambda: factory(10))
    state, saved = network.state_dict(), load_file(path)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    with safe_open(path, "pt") as file:
        before = json.loads(file.metadata()["metrics"])
    after = json.loads(read_metadata(path)["metrics"])
    assert after["kl_divergence"] == before["agreement"] and "agreement" not in after
    assert after["reverse_kl"] == before["reverse_agreement"]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_network_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = OLD / "finished" / "best-macs-0.8.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), tmp_path / "new.safetensors", metadata | {"format": "99"})
    with pytest.raises(WeightsError, match="newer version of RankNAS: it has format 99"):
        rankNAS.load(tmp_path / "new.safetensors", lambda: factory(10))


# --------------------------------------------------------------------------------- studies


def test_a_finished_study_is_shown(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, error = ranknas(capsys, "show", "finished", "--out", ".")
    assert code == 0 and not error
    before = read_json(old / "finished" / "result.json")
    assert "kl_divergence" in shown and "agreement" not in shown
    for answer in before["answers"]:
        assert f"{answer['label']}: trial {answer['trial']}" in shown
    code, printed, _ = ranknas(capsys, "show", "finished", "--out", ".", "--json")
    after = json.loads(printed)
    assert code == 0 and after["objectives"] == ["kl_divergence", "macs"]
    assert [t["budget_key"] for t in after["trials"]] == [t["target"] for t in before["trials"]]
    assert [t["values"] for t in after["trials"]] == [t["values"] for t in before["trials"]]
    chosen = [found["best"]["allocation"] for found in after["solutions"]]
    assert chosen == [found["best"]["allocation"] for found in before["answers"]]


@pytest.mark.parametrize("finished", [True, False])
def test_a_study_is_reported(
    old: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    """Without a result, from the trials in the storage."""
    if not finished:
        (old / "finished" / "result.json").unlink()
    code, _, error = ranknas(capsys, "report", "finished", "--out", ".")
    assert code == 0 and not error
    page = (old / "finished" / "report.html").read_text()
    assert "kl_divergence" in page and "macs&lt;=0.7" in page
    assert "--norm input" in page and "--objective kl_divergence" in page


def test_the_network_of_a_study_is_exported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", ".", "--space", "my_model.py:factory", "--budget", "0.7", "--json"]
    code, printed, error = ranknas(capsys, "export", "finished", *arguments)
    assert code == 0 and not error
    assert json.loads(printed)["max_absolute_difference"] == 0


def test_trials_in_the_storage_are_those_of_the_result(old: Path) -> None:
    trials = stored(old).history().trials
    before = read_json(old / "finished" / "result.json")["trials"]
    assert len(trials) == len(before) == 9
    for trial, written in zip(trials, before, strict=True):
        assert trial.budget_key == written["target"] and trial.probe == written["probe"]
        assert list(trial.values) == written["values"]
        assert trial.metrics["kl_divergence"] == written["metrics"]["agreement"]
        assert trial.allocation.labels() == written["allocation"]


def test_a_damaged_trial_of_an_old_study_is_still_found_out(old: Path) -> None:
    store = stored(old)
    first = store.study.get_trials(deepcopy=False)[0]
    changed = dict(first.user_attrs["ranknas:metrics"]) | {"agreement": 0.5}
    storage = open_storage(f"sqlite:///{old / 'finished' / 'study.db'}")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE trial_user_attributes SET value_json = ? "
            "WHERE trial_id = ? AND key = 'ranknas:metrics'",
            (json.dumps(changed), first._trial_id),
        )
    with pytest.raises(StudyError, match="trial 0 .* is damaged"):
        stored(old).history()


def test_an_old_study_is_not_resumed_but_begun_anew_from_its_best(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", ".", "--trust-study", "--quiet"]
    code, _, error = ranknas(capsys, "resume", "finished", *flags)
    assert code == 2 and len(error.splitlines()) == 1
    assert "made by an older version of RankNAS (format 1; this version continues format" in error
    command = error.rpartition("with: ")[2].split()
    assert command[:2] == ["ranknas", "search"] and command[-2:] == ["--start", "finished"]
    again = [*command[1:], "--study", "anew", "--out", ".", "--quiet", "--json"]
    code, printed, error = ranknas(capsys, *again)
    assert code == 0, error
    document = json.loads(printed)
    before = read_json(old / "finished" / "result.json")
    best = [answer["best"]["allocation"] for answer in before["answers"]]
    assert next(t["allocation"] for t in document["trials"] if not t["probe"]) == best[0]
    # The second one is a probe of this strategy too, so it is evaluated only once.
    assert all(one in [t["allocation"] for t in document["trials"]] for one in best)
    # The start is kept in the study's folder: it resumes without the older study.
    shutil.rmtree(old / "finished")
    code, _, error = ranknas(capsys, "resume", "anew", *flags, "--trials", "3")
    assert code == 0, error


def test_the_python_api_refuses_an_old_study_too(old: Path) -> None:
    with pytest.raises(StudyError, match=r"older version .*start=\[allocation\]") as caught:
        StudyStore.open(
            f"sqlite:///{old / 'finished' / 'study.db'}",
            "finished",
            configuration={},
            choices={},
            directions=("minimize", "minimize"),
            resume=True,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("config.json", "report"),
        ("config.json", "resume"),
        ("result.json", "show"),
        ("result.json", "report"),
        ("result.json", "export"),
    ],
)
def test_a_newer_study_is_refused_in_one_line(
    old: Path, capsys: pytest.CaptureFixture[str], file: str, command: str
) -> None:
    path = old / "finished" / file
    write_json(path, {**read_json(path), "format": 99})
    code, _, error = ranknas(capsys, command, "finished", "--out", ".")
    assert code == 2 and len(error.splitlines()) == 1
    assert f"finished/{file}' was written by a newer version of RankNAS" in error


# ------------------------------------------------------------- comparisons and devices


def test_a_comparison_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are there already, so nothing is searched."""
    arguments = ["--space", "my_model.py:factory", "--weights", "weights.safetensors"]
    arguments += ["--strategies", "solve,uniform", "--budget", "0.8", "--seeds", "1"]
    arguments += ["--calibration", "64", "--validation", "64", "--norm", "input"]
    before = (old / "comparison" / "results.csv").read_text()
    code, _, error = ranknas(capsys, "compare", *arguments, "--out", "comparison", "--quiet")
    assert code == 0, error
    assert (old / "comparison" / "results.csv").read_text() == before


def test_a_profile_is_read(old: Path) -> None:
    before = read_json(old / "device.json")
    profile = Profile.read(old / "device.json")
    assert len(profile.stages) == len(before["stages"]) == 5
    for key, fit in before["networks"].items():
        assert profile.networks[key].remainder_cost == fit["rest"]
    profile.write(old / "again.json")
    assert Profile.read(old / "again.json") == profile
    assert read_json(old / "again.json")["format"] == current_format("device")
