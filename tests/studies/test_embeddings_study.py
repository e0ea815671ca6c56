"""The study of sentence embeddings, on a tiny encoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from language import text_folder, tokenizer_folder
from torch import nn

from rankNAS.plugins import load_callable

FILE = Path(__file__).parents[2] / "studies" / "embeddings" / "sentences.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="not in a checkout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    found = tokenizer_folder(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(found)
    return found


def test_embeddings_are_means_over_what_is_not_padded(folder: Path) -> None:
    model, encode = load_callable(f"{FILE}:loaded")(folder, 16)
    (item,) = encode(["the cat sat ."])
    assert item["attention_mask"].sum() == 4 and len(item["input_ids"]) == 16
    found = model(item["input_ids"][None], item["attention_mask"][None])
    alone = model.encoder(input_ids=item["input_ids"][None, :4])[0].mean(1)
    torch.testing.assert_close(found, nn.functional.normalize(alone, dim=-1))


def test_agreement_of_embeddings() -> None:
    agreement = load_callable(f"{FILE}:agreement")
    x = nn.functional.normalize(torch.randn(20, 6), dim=-1)
    assert agreement(x, x) == pytest.approx({"cosine": 1, "spearman": 1})
    turned = torch.linalg.qr(torch.randn(6, 6))[0]
    found = agreement(x @ turned, x)  # a rotation keeps all similarities
    assert found["spearman"] == pytest.approx(1) and found["cosine"] < 0.99


@pytest.mark.slow
def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text_folder(tmp_path, lines=120)
    command = [f"{FILE}", str(folder), str(tmp_path), "--kept", "0.8", "0.6", "--calibration", "8"]
    command += ["--sentences", "40", "--held-out", "12", "--validation", "8", "--length", "12"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "rows.csv")])
    load_callable(f"{FILE}:main")()
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert list(rows.kept) == 3 * [0.8, 0.6]
    assert rows.cosine.between(0, 1).all() and rows.spearman.between(-1, 1).all()
    printed = capsys.readouterr().out
    assert "| auto |" in printed and str(tmp_path) not in printed
