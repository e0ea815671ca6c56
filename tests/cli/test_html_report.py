"""``ranknas report``: one file that says what the result document says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rankNAS.cli import main
from rankNAS.cli.options import SearchOptions
from rankNAS.cli.options.command import reproduction
from rankNAS.reporting.html import render


class Page(HTMLParser):
    """The elements, the cells of the tables and the scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":  # comes in pieces
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif data.strip():
            self.words.append(data.strip())

    @property
    def policy(self) -> str:
        return next(
            str(attributes["content"])
            for _, attributes in self.elements
            if attributes.get("http-equiv") == "Content-Security-Policy"
        )

    @property
    def figures(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            next(text for attributes, text in self.scripts if attributes.get("id") == "figures")
        )
        return found


@pytest.fixture
def study(finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, in the folder of the test."""
    shutil.copytree(finished_study.parent, tmp_path / "ranknas-studies")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ranknas-studies" / "small"


def report(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ranknas", "report", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def written(study: Path) -> Page:
    return Page((study / "report.html").read_text())


def result_of(study: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study / "result.json").read_text())
    return found


@pytest.mark.slow
def test_the_file_is_written_and_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("small") == 0
    assert Path(capsys.readouterr().out.strip()) == Path("ranknas-studies/small/report.html")
    assert report("small", "--output", "elsewhere.html", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"file": "elsewhere.html", "bytes": Path("elsewhere.html").stat().st_size}


def test_the_page_needs_nothing_else(study: Path) -> None:
    assert report("small") == 0
    page = written(study)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), tag
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
    text = (study / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    assert "default-src 'none'" in page.policy


def test_no_script_runs_but_the_two_of_the_page(study: Path) -> None:
    assert report("small") == 0
    page = written(study)
    allowed = re.findall(r"'sha256-([^']+)'", page.policy)
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in run]
    assert hashes == allowed and len(hashes) == 2
    assert "unsafe-inline" not in page.policy.partition("script-src")[2].partition(";")[0]


def test_the_summary_has_the_numbers_of_the_result(study: Path) -> None:
    assert report("small") == 0
    result, words = result_of(study), written(study).words
    dense = result["dense"]
    assert f"{dense['test_accuracy']:.4f}" in words and f"{dense['macs']:,.0f}" in words
    for solution in result["solutions"]:
        best = solution["best"]
        for name in ("accuracy", "test_accuracy"):
            assert f"{best[name]:.4f}" in words
            assert f"{solution['finetuned'][name]:.4f}" in words
        for name in ("macs", "params", "weight_bytes"):
            assert f"{best[name]:,.0f} of {dense[name]:,.0f}" in words
            assert f"{100 * best[name] / dense[name]:.1f} %" in words
        assert solution["budget_key"] in words


def test_the_figures_have_every_trial_and_every_layer(study: Path) -> None:
    assert report("small") == 0
    result, figures = result_of(study), written(study).figures
    progress, pareto, *ranks = figures
    dots = [t for t in progress["data"] if t["mode"] == "markers"]
    assert sorted(n for t in dots for n in t["x"]) == [t["number"] for t in result["trials"]]
    front = {t["name"]: t for t in pareto["data"] if t["name"].startswith("Pareto front")}
    assert len(front) == len(result["solutions"]) == len(ranks)
    for solution, figure in zip(result["solutions"], ranks, strict=True):
        line = front[f"Pareto front, {solution['budget_key'].replace('<', '&lt;')}"]
        assert len(line["x"]) == len(solution["pareto_front"])
        assert figure["layout"]["yaxis"]["ticktext"] == list(solution["layers"])


def test_the_page_says_how_to_do_it_again(study: Path) -> None:
    assert report("small") == 0
    result, words = result_of(study), " ".join(written(study).words)
    assert "ranknas search --space" in words and "--budget 0.6,0.4" in words
    assert "--strategy random" in words and "--objective macs" in words
    assert f"torch {result['versions']['torch']}" in words
    assert f"{result['machine']['threads']} threads" in words
    assert "Not measured." in words


def test_the_command_names_what_is_not_a_default() -> None:
    options = SearchOptions(space="a b.py:net", budget=["0.5", "params=0.4"], batch_norm=False)
    options = SearchOptions(**{**options.to_json(), "strict_hw": True, "study": "x"})
    assert reproduction(options) == (
        "ranknas search --space 'a b.py:net' --budget 0.5 --budget params=0.4 --no-batch-norm "
        "--strict-hw"
    )


def test_what_users_name_is_inert(study: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    text = (study / "result.json").read_text()
    result = json.loads(text.replace('"3"', json.dumps(evil)))  # the first layer's name
    assert any(evil in a["layers"] for a in result["solutions"])
    result |= {"study": evil, "space": evil, "strategy": evil}
    result["trials"][0] |= {"state": "failed", "values": [], "metrics": {}, "reason": evil}
    for solution in result["solutions"]:
        solution["feasible"] = [n for n in solution["feasible"] if n != 0]
        solution["pareto_front"] = [n for n in solution["pareto_front"] if n != 0]
        solution["budget_key"] = evil
    page = Page(render(result, {evil: evil}, evil))
    assert not any(tag == "img" for tag, _ in page.elements)
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert len(re.findall(r"'sha256-[^']+'", page.policy)) == 2
    assert evil in page.words  # to be read
    drawn = json.dumps(page.figures)
    assert "<script>" not in drawn and "<img" not in drawn and "&lt;script&gt;" in drawn


def test_no_password_is_in_the_report(study: Path) -> None:
    config = json.loads((study / "config.json").read_text())
    secret = "pw-8t3k"
    config["storage"] = f"postgresql://me:{secret}@host/studies"
    (study / "config.json").write_text(json.dumps(config))
    result = result_of(study)
    result["trials"][0]["reason"] = f"no route to {config['storage']}"
    (study / "result.json").write_text(json.dumps(result))
    assert report("small") == 0
    text = (study / "report.html").read_text()
    assert secret not in text and "host/studies" in text


def test_a_search_that_has_not_ended_has_a_report(study: Path) -> None:
    count = len(result_of(study)["trials"])
    (study / "result.json").unlink()
    assert report("small") == 0
    page = written(study)
    assert "The search has not ended" in " ".join(page.words)
    progress, pareto = page.figures
    assert sum(len(t["x"]) for t in progress["data"]) == count
    assert any(t["name"] == "Pareto front" for t in pareto["data"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{}", "is damaged or incomplete"),
        ("{", "small"),
    ],
)
def test_a_damaged_result_is_one_line(
    study: Path, damage: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "result.json").write_text(damage)
    assert report("small") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_storage_elsewhere_must_be_trusted(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "result.json").unlink()
    config = json.loads((study / "config.json").read_text())
    config["storage"] = "postgresql://me:pw-8t3k@host/studies"
    (study / "config.json").write_text(json.dumps(config))
    assert report("small") == 2
    error = capsys.readouterr().err
    assert "--trust-study" in error and "pw-8t3k" not in error


def test_a_report_that_cannot_be_written_says_so(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report("small", "--output", "ranknas-studies/small/config.json/below.html") == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_draws_every_figure(study: Path, browser: Any) -> None:
    assert report("small") == 0
    browser.get((study / "report.html").resolve().as_uri())
    drawn = "return document.querySelectorAll('.plot .main-svg .plot, .plot .bars').length"
    until = time.monotonic() + 60
    places = len(written(study).figures)
    while browser.execute_script(drawn) < places:
        assert time.monotonic() < until
        time.sleep(0.1)
    text = browser.execute_script("return document.body.textContent")
    assert "Pareto front, macs<=0.6" in text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
