from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rankNAS.io.files import cache_folder, save_atomically, write_json


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        save_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


def test_keeps_the_old_file_when_the_writer_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert not list(tmp_path.glob("*.json.tmp")) and temporary.parent == tmp_path
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "atomic", {})
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


def test_json_is_strict_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RANKNAS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/ranknas")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ranknas")
    monkeypatch.setenv("RANKNAS_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")
