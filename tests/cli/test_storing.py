"""``--storage`` of a search, and what is left of it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from postgres import PASSWORD, Cluster

from rankNAS.cli import main
from rankNAS.cli.options import SearchOptions
from rankNAS.storage.store import study_names

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def ranknas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """The command line in this process: its exit code, and all that it prints."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        return int(stopped.value.code or 0), printed.out + printed.err

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def search(finished_study: Path) -> list[str]:
    """A search that takes little time."""
    home = finished_study.parents[1]
    return [
        *("search", "--space", f"{home / 'my_model.py'}:factory", "--strategy", "random"),
        *("--weights", str(home / "weights.safetensors"), "--budget", "0.6", "--trials", "2"),
        *("--calibration", "64", "--validation", "64", "--study", "stored"),
    ]


def shown(folder: Path) -> str:
    """All text in all files of a folder."""
    return "\n".join(
        p.read_text(errors="replace") for p in sorted(folder.rglob("*")) if p.is_file()
    )


@pytest.mark.slow
def test_a_password_is_used_but_not_kept(
    ranknas: Run, search: list[str], postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database()
    code, told = ranknas(*search, "--storage", url)
    assert code == 0, told
    folder = Path("ranknas-studies/stored")
    stored = json.loads((folder / "config.json").read_text())["storage"]
    assert stored == f"postgresql://ranknas@127.0.0.1:{postgres.port}/{url.rpartition('/')[2]}"
    again = ["resume", "stored", "--trust-study", "--trials", "3"]
    code, more = ranknas(*again)
    assert code == 2 and "no password supplied" in more
    code, last = ranknas(*again, "--storage", url)
    assert code == 0, last
    monkeypatch.setenv("RANKNAS_STORAGE_PASSWORD", PASSWORD)
    code, show = ranknas("show", "stored")
    assert code == 0 and "3 trials" in show
    assert study_names(stored) == ["stored"]
    everything = told + more + last + show + shown(Path())
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in everything


@pytest.mark.slow
def test_a_journal(ranknas: Run, search: list[str], tmp_path: Path) -> None:
    code, told = ranknas(*search, "--storage", f"journal:{tmp_path}/study.log")
    assert code == 0, told
    code, told = ranknas("resume", "stored", "--trust-study", "--trials", "3")
    assert code == 0 and "3 trials" in told


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, "does not exist"),
        (0, "it is empty"),
        (4096, "it is damaged"),
        ("another", "has no study 'small', although"),
    ],
)
def test_a_study_whose_storage_is_gone_is_not_begun_again(
    ranknas: Run, finished_study: Path, tmp_path: Path, size: int | str | None, message: str
) -> None:
    shutil.copytree(finished_study.parent, tmp_path / "ranknas-studies")
    path = tmp_path / "ranknas-studies/small/study.db"
    more = []
    assert len(path.read_bytes()) > 4096
    if size is None:
        path.unlink()
    elif isinstance(size, int):
        path.write_bytes(path.read_bytes()[:size])
    else:
        another = tmp_path / "another.db"
        shutil.copy(path, another)
        connection = sqlite3.connect(another)
        connection.execute("UPDATE studies SET study_name = 'other'")
        connection.commit()
        connection.close()
        more = ["--storage", str(another)]
    code, told = ranknas("resume", "small", "--trust-study", "--trials", "6", *more)
    assert code == 2 and message in told and "Traceback" not in told


def test_options_are_kept_without_password() -> None:
    options = SearchOptions(storage="postgresql://me:hidden@host/db?sslpassword=x")
    assert options.to_json()["storage"] == "postgresql://me@host/db"
    assert SearchOptions().to_json()["storage"] is None
