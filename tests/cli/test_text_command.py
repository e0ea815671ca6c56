"""``ranknas search`` on text: options, the result document, resume, and messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from language import text_folder

from rankNAS.cli import main
from rankNAS.cli.options.stored import read_options

Run = Callable[..., tuple[int, str, str]]
MODEL = "from language import Bigram\n\ndef make():\n    return Bigram(256)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    text_folder(folder / "text")
    (folder / "net.py").write_text(MODEL)
    return folder


@pytest.fixture
def run(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Runs a short search with more options; gives its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str, data: str = "text:{}?tokenizer=bytes") -> tuple[int, str, str]:
        capfd.readouterr()
        given = list(options)
        if "resume" not in given:
            source = data.replace("{}", str(place / "text"))
            fixed = ["search", "--space", f"{place}/net.py:make", "--weights", "pretrained"]
            fixed += ["--data", source, "--budget", "layer_params=0.5"]
            given = [*fixed, "--strategy", "uniform", "--trials", "1", "--quiet", *given]
        monkeypatch.setattr(sys, "argv", ["ranknas", *given])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def test_the_result_states_the_test_perplexity(run: Run) -> None:
    code, printed, error = run("--context", "32", "--study", "a", "--json")
    assert code == 0, error
    found = json.loads(printed)
    for name in ("dense", "best"):
        metrics: dict[str, Any] = found[name]
        assert [*metrics][:2] == ["perplexity", "test_perplexity"]
        assert metrics["test_kl_divergence"] >= 0 and metrics["kl_divergence"] >= 0
    assert found["task"] == "causal_lm" and Path(found["artifact"]).is_file()
    kept = read_options(Path("ranknas-studies/a"))
    assert (kept.context, kept.stride, kept.calibration) == (32, None, None)
    code, printed, error = run("resume", "a", "--trust-study", "--json", "--quiet")
    assert code == 0, error
    again = json.loads(printed)
    assert again["dense"] == found["dense"] and again["best"] == found["best"]


def test_the_latency_of_one_token_is_budgeted(run: Run, place: Path) -> None:
    board = "def board(layer, choice):\n    return layer[choice].macs / 1e9\n"
    (place / "board.py").write_text(board)
    given = ["--context", "32", "--json", "--budget", "latency=0.9"]
    given += ["--hardware", f"{place}/board.py:board", "--study"]
    for study, more, tokens in (("whole", [], 32), ("one", ["--latency-tokens", "1"], 1)):
        code, printed, error = run(*given, study, *more)
        assert code == 0, error
        found = json.loads(printed)
        macs = 256 * 24  # of the one layer of the space, for one token
        assert found["dense"]["predicted_latency"] == pytest.approx(tokens * macs / 1e9)
        assert found["best"]["measured_latency"]["seconds"] > 0
    code, _, error = run(*given, "more", "--latency-tokens", "33")
    assert code and "a sample has 32 tokens" in error


def test_a_stride_changes_the_perplexity(run: Run) -> None:
    plain = run("--context", "16", "--json")
    strided = run("--context", "16", "--stride", "4", "--json")
    dense = [json.loads(found[1])["dense"] for found in (plain, strided)]
    assert dense[0]["test_perplexity"] != dense[1]["test_perplexity"]
    assert dense[0]["params"] == dense[1]["params"]


def test_options_in_a_file(run: Run) -> None:
    code, printed, _ = run("--context", "64", "--stride", "8", "--print-config")
    assert code == 0
    assert "context = 64" in printed and "stride = 8" in printed
    assert "# calibration is not set" in printed
    assert "or 32768 tokens." in " ".join(printed.replace("#", "").split())
    Path("text.toml").write_text("context = 100000")
    code, _, error = run("--config", "text.toml")
    assert code == 2 and "less than one window of 100000" in error


def test_windows_are_as_long_as_the_model_takes(run: Run, place: Path) -> None:
    source_code = (
        "from language import tiny_llama\n\ndef make():\n    return tiny_llama(positions=48)\n"
    )
    (place / "llama.py").write_text(source_code)
    text_folder(place / "long", 700)
    named = ["--space", f"{place}/llama.py:make"]
    few = ["--calibration", "8", "--validation", "8"]
    code, printed, error = run(
        *named, *few, "--study", "l", "--json", data=f"text:{place}/long?tokenizer=bytes"
    )
    assert code == 0, error
    assert json.loads(printed)["dense"]["test_perplexity"] > 1
    assert read_options(Path("ranknas-studies/l")).context is None


@pytest.mark.parametrize(
    ("more", "data", "said"),
    [
        (["--context", "100000"], "text:{}?tokenizer=bytes", "less than one window of 100000"),
        (["--context", "8", "--stride", "9"], "text:{}?tokenizer=bytes", "the stride is 9"),
        ([], "text:{}", "needs a tokenizer"),
        ([], "text:{}/nothing?tokenizer=bytes", "there is no file or folder"),
        ([], "text:{}?tokenizer={}", "has no tokenizer that can be read"),
        (["--context", "8"], "digits", "takes no context"),
    ],
)
def test_bad_input_is_one_line(run: Run, more: list[str], data: str, said: str) -> None:
    pytest.importorskip("transformers")
    code, printed, error = run(*more, data=data)
    assert code == 2 and not printed
    assert said in error and len(error.strip().splitlines()) == 1
    assert not Path("ranknas-studies").exists()
