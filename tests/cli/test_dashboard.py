"""``ranknas dashboard``, in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankNAS.cli import main
from rankNAS.cli.commands.dashboard import guarded, note

WAIT = 60  # seconds, at most, for the server and for a page


@pytest.fixture
def study(finished_study: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, as the dashboard writes to it."""
    shutil.copytree(finished_study.parent, tmp_path / "ranknas-studies")
    return tmp_path / "ranknas-studies" / "small"


@pytest.fixture
def address(study: Path) -> Iterator[str]:
    """Of a dashboard on the study, which is stopped after the test."""
    pytest.importorskip("optuna_dashboard", reason="needs the extra `dashboard`")
    command = [sys.executable, "-m", "rankNAS", "dashboard", "small", "--port", "0"]
    log = study / "dashboard.log"
    with log.open("wb") as printed:
        server = subprocess.Popen(
            command, cwd=study.parents[1], stdout=printed, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + WAIT
        while not (found := re.search(r"http://\S+", log.read_text())):
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        server.terminate()
        server.wait(WAIT)


def wait_for(browser: Any, *texts: str) -> str:
    """The text of the page, its figures' included, once all of these are in it."""
    until = time.monotonic() + WAIT
    while True:
        page = str(browser.execute_script("return document.body.textContent"))
        if all(text in page for text in texts):
            return page
        assert time.monotonic() < until, [text for text in texts if text not in page]
        time.sleep(0.2)


@pytest.mark.slow
def test_a_browser_sees_trials_parameters_and_the_pareto_front(
    study: Path, address: str, browser: Any
) -> None:
    result = json.loads((study / "result.json").read_text())
    assert address.startswith("http://127.0.0.1:")
    browser.get(address)
    wait_for(browser, "small")
    browser.get(f"{address}studies/1")
    wait_for(browser, "Pareto front (RankNAS)", *(a["budget_key"] for a in result["solutions"]))
    for number in (0, result["trial"]):
        browser.get(f"{address}studies/1/trials?numbers={number}")
        chosen = result["trials"][number]["allocation"]
        assert list(chosen) == list(result["layers"])
        wait_for(
            browser,
            *(f"Trial {t['number']}" for t in result["trials"]),
            *(f"{layer} {label}" for layer, label in chosen.items()),
        )
    browser.get(f"{address}studies/1/note")
    wait_for(browser, f"{result['best']['test_accuracy']:.4f}")


def failed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ranknas", "dashboard", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_port_in_use_is_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = failed(str(study), "--port", port, capsys=capsys)
    assert f"port {port} of 127.0.0.1 is in use" in error and "--port 0" in error


def test_an_address_of_another_machine_is_refused(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(str(study), "--host", "192.0.2.1", "--port", "0", capsys=capsys)
    assert "'192.0.2.1'" in error and "--host" in error
    assert "65535" in failed(str(study), "--port", "70000", capsys=capsys)


def test_a_study_that_the_storage_lacks(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(study, study.with_name("renamed"))
    error = failed(str(study.with_name("renamed")), "--port", "0", capsys=capsys)
    assert "has no study 'renamed'" in error


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_only_the_machine_itself_unless_told_otherwise(
    study: Path,
    host: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("optuna_dashboard", reason="needs the extra `dashboard`")
    from rankNAS.cli.commands import dashboard as serving

    def interrupt(server: Any) -> None:
        assert server.server_address[0] == host
        raise KeyboardInterrupt

    monkeypatch.setattr(serving._Server, "serve_forever", interrupt)
    options = [] if not warned else ["--host", host]
    monkeypatch.setattr(sys, "argv", ["ranknas", "dashboard", str(study), "--port", "0", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert not stopped.value.code
    assert f"http://{host}:" in printed.out
    assert ("no password" in printed.err) == warned


def test_the_note_has_the_answers(finished_study: Path) -> None:
    result = json.loads((finished_study / "result.json").read_text())
    text = note(result)
    for solution in result["solutions"]:
        assert f"| {solution['best']['test_accuracy']:.4f} |" in text
    assert "has not ended" in note({**result, "solutions": []})
    hostile = note({**result, "space": "a`|\n# b"})
    assert "`a'/ # b`" in hostile.splitlines()[0]


def test_a_note_of_somebody_else_stays(study: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="needs the extra `dashboard`")
    import optuna

    from rankNAS.cli.commands.dashboard import publish

    result = json.loads((study / "result.json").read_text())
    found = optuna.load_study(study_name="small", storage=f"sqlite:///{study / 'study.db'}")
    publish(found, result)
    assert dashboard.get_note(found) == note(result)
    assert found.metric_names == ["accuracy", "macs"]
    publish(found, {**result, "solutions": []})
    assert "has not ended" in dashboard.get_note(found)
    dashboard.save_note(found, "mine")
    publish(found, result)
    assert dashboard.get_note(found) == "mine"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", "200 OK"),
        ("[::1]:8080", "200 OK"),
        ("localhost:9", "200 OK"),
        ("LOCALHOST", "200 OK"),
        ("board", "200 OK"),
        ("evil.example", "403 Forbidden"),
        ("evil.example:8080", "403 Forbidden"),
        ("localhost.evil.example", "403 Forbidden"),
        ("192.168.1.1", "403 Forbidden"),
        ("[::1", "403 Forbidden"),
        ("", "403 Forbidden"),
    ],
)
def test_pages_elsewhere_cannot_ask_under_their_own_name(host: str, status: str) -> None:
    """As they could if their name were made to lead to this machine."""
    found: list[str] = []

    def start(state: str, headers: object, *_: object) -> Any:
        found.append(state)

    def app(environ: dict[str, Any], start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"studies"]

    body = guarded(app, "board")({"HTTP_HOST": host}, start)
    assert found == [status] and (b"studies" in b"".join(body)) == (status == "200 OK")
