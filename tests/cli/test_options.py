"""Options: one field of a dataclass each, on the command line, in TOML and in a study's JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.cli import main
from rankNAS.cli.commands import COMMANDS
from rankNAS.cli.generate import make_command
from rankNAS.cli.loading import check_options
from rankNAS.cli.notices import taken_notices
from rankNAS.cli.options.compare import CompareOptions
from rankNAS.cli.options.fields import PANELS, SEARCH, Options, Spec, option, specs
from rankNAS.cli.options.profile import ProfileOptions
from rankNAS.cli.options.search import SearchControl, SearchOptions
from rankNAS.cli.options.stored import current_options, read_options
from rankNAS.cli.options.toml_file import read_toml, to_toml
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.io.files import write_json
from rankNAS.recovery.config import Refinement
from rankNAS.renamed import OPTIONS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ranknas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command line in this process: its exit code, what it prints and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return run


# ------------------------------------------------------------------------------- one source


@dataclass(frozen=True, kw_only=True)
class More(SearchOptions):
    """Options with one more field."""

    colour: str = option("red", "The colour of the bars.", SEARCH)


def run_more(options: More, control: SearchControl) -> None:
    """What the command of these tests does."""
    typer.echo(f"{options.colour} {options.trials} {control.quiet}")


def more_command(*arguments: str) -> None:
    app = typer.Typer(rich_markup_mode="rich")
    command = make_command("More.", f"{__name__}:run_more", More, SearchControl)
    app.command(add_help_option=False)(command)
    app(list(arguments), standalone_mode=False)


def test_a_field_is_all_that_an_option_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    more_command("--colour", "blue", "--quiet")
    assert capsys.readouterr().out == "blue 40 True\n"
    more_command("--help")
    shown = capsys.readouterr().out
    assert "--colour" in shown and "The colour of the bars. [default: red]" in shown
    more_command("--colour", "green", "--print-config")
    printed = capsys.readouterr().out
    assert '# The colour of the bars.\ncolour = "green"' in printed
    (tmp_path / "more.toml").write_text(printed)
    more_command("--config", str(tmp_path / "more.toml"), "--trials", "3")
    assert capsys.readouterr().out == "green 3 False\n"
    assert More(colour="blue").to_json()["colour"] == "blue"
    assert "colour" not in SearchOptions().to_json()


@pytest.mark.parametrize(
    "cls", dict.fromkeys(cls for *_, groups in COMMANDS.values() for cls in groups)
)
def test_every_field_is_an_option(cls: type[Options]) -> None:
    names = [spec.name for spec in specs(cls)]
    assert names == [f.name for f in fields(cls)]
    for spec in specs(cls):
        assert spec.option.panel in PANELS
        assert spec.option.help.endswith((".", "…")), spec.name
        assert spec.option.positional or spec.within_bounds(spec.default)


@pytest.mark.parametrize(("command", "groups"), [(n, g) for n, (_, _, g) in COMMANDS.items()])
def test_help_shows_what_is_not_hidden(
    ranknas: Run, command: str, groups: tuple[type[Options], ...]
) -> None:
    code, shown, _ = ranknas(command, "--help")
    assert code == 0 and max(map(len, shown.splitlines())) <= 80
    words = shown.replace(",", " ").split()
    for cls in groups:
        for spec in specs(cls):
            name = spec.name.upper() if spec.option.positional else spec.flag
            assert (name in words) is not spec.option.hidden, name
    for old in OPTIONS:
        assert f"--{old.replace('_', '-')}" not in words


def test_the_help_of_a_search_is_short(ranknas: Run) -> None:
    every = [*specs(SearchOptions), *specs(SearchControl)]
    visible = [spec for spec in every if not spec.option.hidden]
    assert 25 <= len(visible) <= 30 < len(every)
    _, shown, _ = ranknas("search", "--help")
    assert len(shown.splitlines()) < 100
    places = [shown.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)


def test_options_of_two_commands_agree() -> None:
    of_search, of_compare, of_profile = (
        {spec.name: spec for spec in specs(cls)}
        for cls in (SearchOptions, CompareOptions, ProfileOptions)
    )
    shared = of_search.keys() & of_compare.keys() - {"budget", "out"}
    assert len(shared) > 20
    assert [of_search[name] for name in shared] == [of_compare[name] for name in shared]
    for name in ("space", "operators", "candidates", "multiple_of", "exclude", "image_size"):
        assert of_search[name] == of_profile[name]


# ----------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--trials", "0"], "`--trials` must be at least 1, got 0."),
        (["search", "--workers", "0"], "`--workers` must be at least 1, got 0."),
        (["search", "--finetune", "-1"], "`--finetune` must be at least 0, got -1."),
        (["search", "--trial-samples", "1"], "`--trial-samples` must be at least 2, got 1."),
        (["search", "--gpus-per-trial", "nan"], "`--gpus-per-trial` must be at least 0, got nan."),
        (["compare", "--seeds", "0"], "`--seeds` must be at least 1, got 0."),
        (["compare", "--finetune-samples", "0"], "`--finetune-samples` must be at least 1, got"),
        (["resume", "none", "--trials", "0"], "`--trials` must be at least 1, got 0."),
        (["compile", "--image-size", "0"], "`--image-size` must be at least 1, got 0."),
        (["profile", "--validate", "-1"], "`--validate` must be at least 0, got -1."),
        (["dashboard", "none", "--port", "70000"], "`--port` must be from 0 to 65535, got 70000."),
        (["profile", "--seed", "-1"], "`--seed` must be from 0 to 4294967295, got -1."),
        (["profile", "--device", "banana"], "`device` 'banana' cannot be used on this machine"),
        (["compare", "--device", "banana"], "`device` 'banana' cannot be used on this machine"),
        (["compile", "--exclude", "("], "`exclude` '(' is no regular expression"),
        (["profile", "--exclude", "("], "`exclude` '(' is no regular expression"),
        (["compile", "--operators", ""], "`operators` is empty"),
    ],
)
def test_bounds_are_one_line(ranknas: Run, arguments: list[str], message: str) -> None:
    code, _, error = ranknas(*arguments)
    assert code == 2 and message in error and len(error.splitlines()) == 1


def test_bounds_hold_in_python_and_in_a_study(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`--trials` must be at least 1, got 0"):
        SearchOptions(trials=0)
    write_json(tmp_path / "config.json", {"trials": 0})
    with pytest.raises(StudyError, match="trials is 0, expected a whole number, at least 1"):
        read_options(tmp_path)


# ---------------------------------------------------------------------------------- old names


def test_old_names_are_accepted_with_a_line(ranknas: Run) -> None:
    old = ["--metric", "input", "--latency-steps", "0.1", "--only-faster"]
    new = ["--norm", "input", "--latency-tolerance", "0.1", "--require-speedup"]
    for command in ("search", "compare"):
        code, printed, error = ranknas(command, *old, "--objective", "agreement", "--print-config")
        assert code == 0
        assert error.splitlines() == [
            "ranknas: warning: objective 'agreement' is now 'kl_divergence'.",
            "ranknas: warning: --metric is now --norm.",
            "ranknas: warning: --latency-steps is now --latency-tolerance.",
            "ranknas: warning: --only-faster is now --require-speedup.",
        ]
        again = ranknas(command, *new, "--objective", "kl_divergence", "--print-config")
        assert again == (0, printed, "")


def test_an_old_name_and_a_mistake_are_one_line(ranknas: Run) -> None:
    code, _, error = ranknas("search", "--metric", "fischer")
    assert code == 2 and len(error.splitlines()) == 1
    assert "got 'fischer'" in error and error.endswith("(--metric is now --norm.)\n")
    code, _, error = ranknas("search", "--metric", "input", "--norm", "input")
    assert code == 2 and "--metric is now --norm; give only one of them." in error
    assert taken_notices() == []


def test_old_names_in_a_file(ranknas: Run, tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('metric = "input"\nobjective = ["reverse_agreement"]\n')
    code, printed, error = ranknas("search", "--config", "old.toml", "--print-config")
    assert code == 0 and 'norm = "input"' in printed and '"reverse_kl"' in printed
    assert error.splitlines() == [
        "ranknas: warning: old.toml: objective 'reverse_agreement' is now 'reverse_kl'.",
        "ranknas: warning: old.toml: metric is now norm.",
    ]
    (tmp_path / "both.toml").write_text('metric = "input"\nnorm = "input"\n')
    code, _, error = ranknas("search", "--config", "both.toml", "--print-config")
    assert code == 2 and "both.toml: metric is now norm; give only one of them." in error


def test_old_names_in_a_study_are_silent(tmp_path: Path) -> None:
    stored = {"metric": "input", "only_faster": True, "objective": ["agreement", "macs"]}
    write_json(tmp_path / "config.json", stored)
    options = read_options(tmp_path)
    assert options.norm == "input" and options.require_speedup
    assert options.objective == ["kl_divergence", "macs"]
    assert current_options([1], Path("config.json")) == [1]


# --------------------------------------------------------------------------------------- TOML


def values(spec: Spec) -> st.SearchStrategy[Any]:
    """Values that an option can have."""
    least, most = spec.option.min, spec.option.max
    text = st.text(st.characters(exclude_categories=["Cs"]))
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        str: text,
        bool: st.booleans(),
        int: st.integers(
            None if least is None else int(least), None if most is None else int(most)
        ),
        float: st.floats(least, most, allow_nan=False),
    }
    one = kinds.get(spec.plain_kind, st.lists(text, min_size=int(least or 0)))
    return one if spec.kind is spec.plain_kind else st.none() | one


def made(cls: type[Options]) -> st.SearchStrategy[Options]:
    return st.builds(cls, **{s.name: values(s) for s in specs(cls) if s.name != "storage"})


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("cls", [SearchOptions, CompareOptions])
def test_what_is_printed_is_read(
    cls: type[Options], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    options = data.draw(made(cls))
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    path.write_text(to_toml(options), encoding="utf-8", newline="")
    assert cls(**read_toml(path, cls)) == options


def test_the_command_line_wins_over_the_file(ranknas: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'budget = ["0.5", "params=0.4"]\ntrials = 7\nlearning_rate = 1\nbatch_norm = false\n'
    )
    given = ["--config", "my.toml", "--trials", "40", "--batch-norm", "--budget", "0.3"]
    code, printed, _ = ranknas("search", *given, "--print-config")
    assert code == 0
    (tmp_path / "effective.toml").write_text(printed)
    found = SearchOptions(**read_toml(tmp_path / "effective.toml", SearchOptions))
    assert found == replace(SearchOptions(), learning_rate=1.0, budget=["0.3"])
    assert ranknas("search", "--config", "effective.toml", "--print-config")[1] == printed


def test_no_password_is_printed(ranknas: Run) -> None:
    storage = "postgresql://me:hidden@host/db"
    _, printed, _ = ranknas("search", "--storage", storage, "--print-config")
    assert 'storage = "postgresql://me@host/db"' in printed and "hidden" not in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trails = 4", "there is no option 'trails' (it is 4); expected perhaps 'trials'"),
        ("[search]\ntrials = 4", "there is no option 'search' (it is {'trials': 4})"),
        ("quiet = true", "there is no option 'quiet'"),
        ('trials = "many"', "trials is 'many', expected a whole number, at least 1"),
        ("trials = true", "trials is True, expected a whole number, at least 1"),
        ("trials = 0", "trials is 0, expected a whole number, at least 1"),
        ("trials = 1.5", "trials is 1.5, expected a whole number"),
        ("image_size = 0", "image_size is 0, expected a whole number, at least 1"),
        ("gpus_per_trial = nan", "gpus_per_trial is nan, expected a number, at least 0"),
        ("budget = 0.5", "budget is 0.5, expected a list of texts"),
        ("budget = [0.5]", "budget is [0.5], expected a list of texts"),
        ("objective = 'loss'", "objective is 'loss', expected a list of texts"),
        ("objective = [['agreement']]", "objective is [['agreement']], expected a list of texts"),
        ("batch_norm = 1", "batch_norm is 1, expected true or false"),
        ("space = 3", "space is 3, expected a text"),
        ("space = ", "(at end of document)"),
        ("a = 1\na = 2", "Cannot overwrite a value"),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    ranknas: Run, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "my.toml").write_text(content)
    code, _, error = ranknas("search", "--config", "my.toml")
    assert code == 2 and len(error.splitlines()) == 1
    assert "my.toml" in error and message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.toml"]


def test_a_file_that_cannot_be_read(ranknas: Run, tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", ".", "binary.toml"):
        code, _, error = ranknas("compare", "--config", name)
        assert code == 2 and len(error.splitlines()) == 1 and f"'{name}'" in error


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"refine": True}, Refinement()),
        ({"refine": True, "refine_steps": 8}, Refinement(steps=8)),
        ({"refine_steps": 8}, Refinement(steps=8)),
    ],
)
def test_a_number_of_steps_asks_for_a_refinement(
    given: dict[str, Any], expected: Refinement | None
) -> None:
    options = SearchOptions(space="resnet20", **given)
    assert check_options(options).refine == expected
