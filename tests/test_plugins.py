"""Callables from files of the user."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.plugins import is_plugin, load_callable


def write(folder: Path, content: str, name: str = "user.py") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_loads_functions_and_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "def seven():\n    return 7\nclass Thing:\n    size = 3\n")
    assert load_callable(f"{path}:seven")() == 7
    assert load_callable(f"{path}:Thing")().size == 3


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def seven():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_callable("user.py:seven")() == 7
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert load_callable("~/user.py:seven")() == 7


def test_an_unchanged_file_is_imported_once_and_its_objects_pickle(tmp_path: Path) -> None:
    path = write(tmp_path, "class Thing:\n    pass\n")
    first = load_callable(f"{path}:Thing")
    assert load_callable(f"{path}:Thing") is first
    assert type(pickle.loads(pickle.dumps(first()))) is first


def test_an_edited_file_is_imported_anew(tmp_path: Path) -> None:
    path = write(tmp_path, "def value():\n    return 1\n")
    assert load_callable(f"{path}:value")() == 1
    write(tmp_path, "def value():\n    return 1 + 1\n")
    assert load_callable(f"{path}:value")() == 2


def test_equal_file_names_do_not_clash(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name, f"def name():\n    return {name!r}\n"))
    assert [load_callable(f"{path}:name")() for path in paths] == ["a", "b"]


def test_dataclasses_in_the_file_work(tmp_path: Path) -> None:
    content = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
    )
    assert load_callable(f"{write(tmp_path, content)}:Point")(4).x == 4


@pytest.mark.parametrize("spec", ["user.py", "user:name", "user.py:", "user.py:a b", "", ":f"])
def test_malformed(spec: str) -> None:
    assert not is_plugin(spec)
    with pytest.raises(UsageError, match=r"the objective .* form path/to/file\.py:name"):
        load_callable(spec, "objective")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none\.py for the model \(No such file"):
        load_callable(f"{tmp_path}/none.py:f", "model")


def test_missing_name_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "from math import sqrt\ndef make_data(): ...\ndef _make_dat(): ...\n")
    with pytest.raises(
        UnknownNameError,
        match=r"unknown data factory 'make_dat'\. Did you mean 'make_data'\? Known: make_data\. ",
    ):
        load_callable(f"{path}:make_dat", "data factory")


def test_not_callable(tmp_path: Path) -> None:
    path = write(tmp_path, "data = 3\n")
    with pytest.raises(
        UsageError, match=r"'data' in .*user\.py is a int, but a data factory must"
    ):
        load_callable(f"{path}:data", "data factory")


@pytest.mark.parametrize(
    ("content", "raised"),
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_exception_in_the_file_is_named_each_time(
    tmp_path: Path, content: str, raised: str
) -> None:
    path = write(tmp_path, content)
    for _ in range(2):  # a module that failed must not stay half-imported
        with pytest.raises(UsageError, match=rf"user\.py raised {raised}"):
            load_callable(f"{path}:f")
