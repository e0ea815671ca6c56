from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import text_folder, tokenizer_folder

import rankNAS
from rankNAS.data.loading import load_data
from rankNAS.data.text.masking import SHARE, Masked
from rankNAS.data.text.windows import Tokens, packed, padded
from rankNAS.exceptions import DataError, UsageError
from rankNAS.settings import Settings


class Hiding:
    """A tokenizer of numbers with the mask 999; the numbers 5 and 6 are special."""

    name, mask, special = "numbers", 999, frozenset({5, 6})


def windows(count: int, length: int) -> Masked:
    tokens = Tokens(np.arange(count, dtype=np.int32), np.array([count]))
    return Masked(packed(tokens, length), 0.3, Hiding())  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(20, 300), length=st.integers(2, 20))
def test_labels_are_what_is_hidden(count: int, length: int) -> None:
    found = windows(count, length)
    batch = found.batch(torch.arange(len(found)))
    plain = torch.arange(len(found) * length).reshape(-1, length)
    hidden = batch["input_ids"] == 999
    assert torch.equal(batch["labels"] != -100, hidden)
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), plain)
    assert not hidden[(plain == 5) | (plain == 6)].any()


def test_the_share_is_that_of_the_tokens_and_every_pass_hides_the_same() -> None:
    found = windows(20_000, 100)
    batch = found.batch(torch.arange(200))
    # The standard deviation of the share of 20,000 independent draws is 0.0032.
    assert float((batch["labels"] != -100).double().mean()) == pytest.approx(0.3, abs=0.012)
    assert torch.equal(found[7]["input_ids"], batch["input_ids"][7])
    other = windows(20_000, 50).batch(torch.arange(400))
    assert torch.equal(other["labels"].reshape(200, 100), batch["labels"])


def test_padding_is_not_hidden() -> None:
    tokens = Tokens(np.arange(40, dtype=np.int32), np.arange(2, 41, 2))
    found = Masked(padded(tokens, 8, 0), 0.9, Hiding())  # type: ignore[arg-type]
    batch = found.batch(torch.arange(len(found)))
    assert not (batch["labels"] != -100)[batch["attention_mask"] == 0].any()
    assert (batch["labels"] != -100).any()


def folder_with_mask(folder: Path) -> Path:
    """A folder with a tokenizer whose mask is <unk>."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder(folder))
    tokenizer.mask_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_masked_model_is_searched_by_the_perplexity_of_hidden_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = folder_with_mask(tmp_path / "model")
    transformers.BertForMaskedLM(config).save_pretrained(model)
    source = f"text:{text_folder(tmp_path / 'text')}"
    study = rankNAS.search(
        f"hf:{model}",
        source,
        budget={"layer_params": 0.7},
        strategy="uniform",
        n_trials=1,
        settings=Settings(calibration=8, validation=4),
    )
    assert study.task.name == "masked_lm" and study.best.metrics["perplexity"] > 1
    labels = torch.stack([study.data.test[i]["labels"] for i in range(len(study.data.test))])
    assert 0.05 < float((labels != -100).double().mean()) < 0.3
    plain = load_data(f"{source}?mask=no", tokenizer=str(model), context=32, mask=SHARE)
    assert [*plain.test[0]] == ["input_ids"]
    more = load_data(f"{source}?mask=0.5", tokenizer=str(model), context=32)
    assert len({plain.fingerprint, more.fingerprint, study.data.fingerprint}) == 3


@pytest.mark.parametrize("share", ["1", "-0.2", "half", "nan"])
def test_a_share_that_is_none(share: str, tmp_path: Path) -> None:
    source = f"text:{text_folder(tmp_path)}?tokenizer=bytes&mask={share}"
    with pytest.raises(DataError, match=f"masked tokens is {share}; give a number above 0"):
        load_data(source, context=16)


def test_a_tokenizer_without_a_mask_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer 'bytes' has no mask token"):
        load_data(f"text:{text_folder(tmp_path)}?tokenizer=bytes&mask=0.2", context=16)
    np.save(tmp_path / "train.npy", np.ones((4, 8), dtype=np.int64))
    np.save(tmp_path / "test.npy", np.ones((4, 8), dtype=np.int64))
    with pytest.raises(UsageError, match="needs a tokenizer to mask tokens"):
        load_data(f"tokens:{tmp_path}?mask=0.2")
