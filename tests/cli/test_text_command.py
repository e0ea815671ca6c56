"""``ranknas search`` on text: options, the result document, resume, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from language import text_folder

from rankNAS.cli import main
from rankNAS.cli.options.search import SearchOptions
from rankNAS.cli.options.stored import read_options

MODEL = "from language import Bigram\n\ndef make():\n    return Bigram(256)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    text_folder(folder / "text")
    (folder / "net.py").write_text(MODEL)
    return folder


def arguments(place: Path, *more: str, data: str = "text:{}?tokenizer=bytes") -> list[str]:
    return [
        *("search", "--space", f"{place}/net.py:make", "--weights", "pretrained"),
        *("--data", data.format(place / "text"), "--budget", "layer_params=0.5"),
        *("--strategy", "uniform", "--trials", "1", "--quiet", "--json", *more),
    ]


def test_the_result_states_the_test_perplexity(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(place, "--context", "32", "--out", str(tmp_path), "--study", "a")
    assert main(options) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("dense", "best"):
        metrics: dict[str, Any] = found[name]
        assert [*metrics][:2] == ["perplexity", "test_perplexity"]
        assert metrics["test_kl_divergence"] >= 0 and metrics["kl_divergence"] >= 0
    assert found["task"] == "causal_lm" and Path(found["artifact"]).is_file()
    kept = read_options(tmp_path / "a")
    assert (kept.context, kept.stride, kept.calibration) == (32, None, None)
    assert main(["resume", "a", "--out", str(tmp_path), "--trust-study", "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["dense"] == found["dense"] and again["best"] == found["best"]


def test_a_stride_changes_the_perplexity(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = []
    for stride in ((), ("--stride", "4")):
        assert main(arguments(place, "--context", "16", "--out", str(tmp_path), *stride)) == 0
        values.append(json.loads(capsys.readouterr().out)["dense"])
    assert values[0]["test_perplexity"] != values[1]["test_perplexity"]
    assert values[0]["params"] == values[1]["params"]


def test_options_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--context", "64", "--stride", "8", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "context = 64" in printed and "stride = 8" in printed
    assert "# calibration is not set" in printed
    assert "32768 tokens of text" in " ".join(printed.replace("#", "").split())
    assert SearchOptions().context is None


@pytest.mark.parametrize(
    ("more", "data", "said"),
    [
        (["--context", "100000"], "text:{}?tokenizer=bytes", "less than one window of 100000"),
        (["--context", "1"], "text:{}?tokenizer=bytes", "--context"),
        (["--context", "8", "--stride", "9"], "text:{}?tokenizer=bytes", "the stride is 9"),
        ([], "text:{}", "needs a tokenizer"),
        ([], "text:{}/nothing?tokenizer=bytes", "there is no file or folder"),
        ([], "text:{}?tokenizer={}", "has no tokenizer that can be read"),
        (["--context", "8"], "digits", "takes no context"),
    ],
)
def test_bad_input_is_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    data: str,
    said: str,
) -> None:
    pytest.importorskip("transformers")
    options = arguments(
        place, *more, "--out", str(tmp_path), data=data.replace("={}", f"={place}")
    )
    assert main(options) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
