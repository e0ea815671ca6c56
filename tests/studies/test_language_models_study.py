"""A small GPT is trained and written, and methods are compared on it: a run of a few seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from rankNAS.plugins import load_callable

STUDIES = Path(__file__).parents[2] / "studies"
TRAINING, METHODS = STUDIES / "recovery" / "train_gpt.py", STUDIES / "smollm2" / "methods.py"
pytestmark = pytest.mark.skipif(not METHODS.is_file(), reason="not in a checkout")
pytest.importorskip("transformers")


def test_a_trained_model_and_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path / "cache"))
    text, folder, out = tmp_path / "text.txt", tmp_path / "gpt", tmp_path / "rows.csv"
    text.write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(800)))
    sizes = "--blocks 2 --width 32 --heads 2 --context 32 --batch 8 --minutes 0.04"
    options = f"--text text:{text} {sizes} --threads 1 --speed plain --out {folder}"
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *options.split()])
    load_callable(f"{TRAINING}:main")()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2e6

    given = f"--model hf:{folder} --text text:{text}?tokenizer=bytes --threads 1 --out {out}"
    given += " --calibration 16 --validation 16"
    for method, more in (("svd-llm", ""), ("svd-llm", " --recover distil:epochs=1,speed=plain")):
        child = f"{given}{more} --child {method},0,0.5"
        monkeypatch.setattr(sys, "argv", ["methods.py", *child.split()])
        load_callable(f"{METHODS}:main")()
    rows = pd.read_csv(out)
    trained = "svd-llm + distil:epochs=1,speed=plain"
    assert list(rows.method) == ["dense", "svd-llm", trained]
    assert (rows.layer_params[1:] <= 0.5).all() and (rows.perplexity < 256).all()
    assert rows.perplexity[2] < rows.perplexity[1]
    known = load_callable(f"{METHODS}:is_known")
    assert known(out, trained, 0, [0.5]) and not known(out, trained, 1, [0.5])
