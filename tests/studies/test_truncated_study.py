"""The study of truncated language models: its text, its rows, and a run of a few seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rankNAS.plugins import load_callable

FILE = Path(__file__).parents[2] / "studies" / "recovery" / "truncated.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="not in a checkout")
pytest.importorskip("transformers")

LINE = "the quick brown fox jumps over the lazy dog again and again"


def test_a_cleaned_text() -> None:
    cleaned = load_callable(f"{FILE}:cleaned")
    raw = (
        f" = Head = \n\n\n 1 @,@ 000 <unk> men , he\tsaid .\n{LINE}\n\n\n\nshort\n{LINE} \nshort\n"
    )
    assert cleaned(raw) == f"1,000 men, he said.\n{LINE}\n\nshort\nshort\n"
    assert cleaned(cleaned(raw)) == cleaned(raw)


def test_parts_of_a_file_end_with_a_line(tmp_path: Path) -> None:
    parts = load_callable(f"{FILE}:parts")
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "all.txt").write_text(text)
    (_, train), (_, test) = parts(tmp_path / "all.txt")
    assert train + test == text and train.endswith("\n") and 8 <= test.count("\n") <= 12
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert dict(parts(tmp_path)) == {"train": "train", "test": "test"}


def test_every_method_gives_a_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all.txt").write_text("".join(f"{i} {LINE}\n" for i in range(60)))
    out, main = tmp_path / "out", load_callable(f"{FILE}:main")
    given = ["truncated.py", "--text", f"text:{tmp_path / 'all.txt'}", "--out", str(out)]
    given += ["--seconds", "1.5", "--blocks", "4", "--kept", "2", "--width", "8", "--heads", "2"]
    given += ["--context", "16", "--batch", "8", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [*given, "--texts", "raw"])
    main()
    rows = load_callable(f"{FILE}:rows_of")(out / "rows.csv")
    assert [row["method"] for row in rows] == [
        *("all blocks", "kept, not trained", "truncated", "truncated-distilled"),
        *("scratch", "scratch-distilled"),
    ]
    assert [row["blocks"] for row in rows] == ["4", "2 even", "2 even", "2 even", "2", "2"]
    values = {row["method"]: float(row["perplexity_raw"]) for row in rows}
    assert values["truncated"] < values["kept, not trained"] * 1.01
    assert all(int(row["steps"]) > 0 for row in rows if row["method"] != "kept, not trained")
    parameters = [int(row["parameters"]) for row in rows]
    assert parameters[0] > parameters[1] == parameters[2] == parameters[4]
    main()
    assert load_callable(f"{FILE}:rows_of")(out / "rows.csv") == rows
