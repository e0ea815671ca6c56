from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import sentence, text_folder, tokenizer_folder

from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
from rankNAS.data.splits import split
from rankNAS.data.text.loading import is_text
from rankNAS.data.text.tokenizers import ByteTokenizer
from rankNAS.exceptions import DataError, UnknownNameError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("text"))


def bytes_of(samples: Samples | None) -> bytes:
    assert samples is not None
    return b"".join(bytes(item["input_ids"].tolist()) for item in samples)


def test_packed_windows(folder: Path) -> None:
    data = load_data(f"text:{folder}?tokenizer=bytes", context=32)
    for part, samples in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        content = (folder / f"{part}.txt").read_bytes()
        assert bytes_of(samples) == content[: len(content) // 32 * 32]
    assert data.text is not None
    assert (data.text.context, data.text.vocabulary, data.text.tokenizer) == (32, 256, "bytes")
    assert data.text.largest == max((folder / "train.txt").read_bytes())
    assert (data.num_classes, data.input_shape) == (256, None)


def test_a_tokenizer_of_a_folder_and_of_an_object(folder: Path, tmp_path: Path) -> None:
    named = load_data(f"text:{folder}?tokenizer={tokenizer_folder(tmp_path)}", context=16)
    given = load_data(f"text:{folder}", tokenizer=str(tmp_path), context=16)
    assert named.fingerprint == given.fingerprint
    assert named.num_classes == 20 and named.train[0]["input_ids"].max() < 20
    own = load_data(f"text:{folder}", tokenizer=ByteTokenizer(), context=16)
    assert own.fingerprint == load_data(f"text:{folder}?tokenizer=bytes", context=16).fingerprint
    # What the source names comes first.
    first = load_data(f"text:{folder}?tokenizer=bytes", tokenizer=str(tmp_path), context=16)
    assert first.fingerprint == own.fingerprint != named.fingerprint


def test_fingerprints_follow_content_and_windows(folder: Path, tmp_path: Path) -> None:
    source = f"text:{folder}?tokenizer=bytes"
    copy = text_folder(tmp_path)
    same = load_data(f"text:{copy}?tokenizer=bytes", context=16).fingerprint
    assert load_data(source, context=16).fingerprint == same
    (copy / "test.txt").write_text((copy / "test.txt").read_text() + "x")
    others = {
        load_data(f"text:{copy}?tokenizer=bytes", context=16).fingerprint,
        load_data(source, context=17).fingerprint,
        load_data(source, context=16, stride=4).fingerprint,
        load_data(f"{source}&pack=no", context=16).fingerprint,
    }
    assert len(others) == 4 and same not in others


def test_a_stride_counts_each_token_of_the_test_text_once(folder: Path) -> None:
    data = load_data(f"text:{folder}?tokenizer=bytes", context=32, stride=5)
    assert data.test is not None and data.valid is not None
    batch = data.test.batch()
    labels = batch["labels"][:, 1:]
    counted = bytes(labels[labels != -100].tolist())
    assert counted == (folder / "test.txt").read_bytes()[1:]
    train = data.train.batch()
    assert torch.equal(train["labels"], train["input_ids"])
    assert len(data.train) == len((folder / "train.txt").read_bytes()) // 32
    assert [*data.valid[0]] == [*data.test[0]] == [*data.train[0]]


def test_padded_lines(folder: Path) -> None:
    data = load_data(f"text:{folder}?tokenizer=bytes&pack=no")
    lines = [x for x in (folder / "train.txt").read_text().splitlines() if x]
    longest = max(
        len(line)
        for part in ("train", "test", "valid")
        for line in (folder / f"{part}.txt").read_text().splitlines()
    )
    assert len(data.train) == len(lines)
    item = data.train[1]
    assert item["input_ids"].shape == (longest,)
    real = item["input_ids"][item["attention_mask"].bool()]
    assert bytes(real.tolist()).decode() == lines[1]
    assert data.text is not None and data.text.context == longest
    short = load_data(f"text:{folder}?tokenizer=bytes&pack=no", context=8)
    assert short.train[0]["input_ids"].shape == (8,)


def test_other_kinds(tmp_path: Path) -> None:
    lines = [json.dumps({"body": sentence(i)}) for i in range(60)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    data = load_data(f"jsonl:{tmp_path}/all.jsonl?field=body&tokenizer=bytes", context=24)
    assert bytes_of(data.train).startswith(sentence(0).encode() + b"\0" + sentence(1)[:2].encode())
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(60)]})
    stored.save_to_disk(tmp_path / "set")
    other = load_data(f"datasets:{tmp_path}/set?tokenizer=bytes", context=24)
    assert other.fingerprint == data.fingerprint


def test_stored_windows(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (9, 8)).astype(np.uint16)
    np.save(tmp_path / "train.npy", ids)
    np.save(tmp_path / "test.npy", ids[:3])
    data = load_data(f"tokens:{tmp_path}")
    assert torch.equal(data.train.batch()["input_ids"], torch.from_numpy(ids.astype(np.int64)))
    assert data.text is not None and data.text.context == 8
    assert data.text.largest == int(ids.max()) and data.text.vocabulary is None
    cut = load_data(f"tokens:{tmp_path}", context=3)
    assert len(cut.train) == 18
    assert cut.train[1]["input_ids"].tolist() == ids[0, 3:6].tolist()
    with pytest.raises(DataError, match=r"windows of 8 tokens, less than the context of 9; give"):
        load_data(f"tokens:{tmp_path}", context=9)
    with pytest.raises(DataError, match="has windows of its own, so a stride has no effect"):
        load_data(f"tokens:{tmp_path}", stride=2)
    np.save(tmp_path / "test.npy", ids[:3].astype(np.int64) - 40)
    with pytest.raises(DataError, match=r"\(test\) has the token id -\d+; ids begin with 0"):
        load_data(f"tokens:{tmp_path}")


@pytest.mark.parametrize("parts", ["train test", "train test valid"])
def test_named_parts_never_overlap(tmp_path: Path, parts: str) -> None:
    text_folder(tmp_path, 200, parts)
    data = load_data(f"text:{tmp_path}?tokenizer=bytes", context=32)
    found = split(data, calibration=12, validation=5, seed=3)
    train = {bytes_of(data.train.take(torch.tensor([i]))) for i in range(len(data.train))}
    sets = [
        {bytes(item["input_ids"].tolist()) for item in part}
        for part in (found.calibration, found.validation, found.training)
    ]
    calibration, validation, training = sets
    assert (len(calibration), len(validation)) == (12, 5)
    assert calibration <= training <= train and not validation & training
    assert validation.isdisjoint(train) == ("valid" in parts)
    assert found.test is data.test
    if "valid" in parts:
        assert len(found.training) == len(data.train)
        everything = split(data, calibration=10**6, validation=10**6, seed=0)
        assert len(everything.calibration) == len(data.train)
        assert data.valid is not None and len(everything.validation) == len(data.valid)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text:DIR", {}, r"needs a tokenizer; give text:.*\?tokenizer=FOLDER with .*=bytes for one"),
    ("text:DIR?pack=no", {}, r"give text:.*\?pack=no&tokenizer=FOLDER with"),
    ("text:DIR?tokenizer=bytes", {"context": 10**5}, r"train\.txt has \d+ tokens, less than one"),
    ("text:DIR?tokenizer=bytes", {"context": 1}, "the context is 1; give at least 2 tokens"),
    ("text:DIR?tokenizer=bytes", {"context": 8, "stride": 9}, "is 9; give .* from 1 to the cont"),
    ("text:DIR?tokenizer=bytes", {"stride": 0}, "the stride is 0"),
    ("text:DIR?tokenizer=bytes&pack=no", {"stride": 2}, "leave out the stride, or pack=no"),
    ("text:DIR?tokenizer=bytes&pack=maybe", {}, "has pack=maybe; give pack=yes or pack=no"),
    ("text:DIR?field=a", {}, r"has the option 'field=a'; text:PATH takes tokenizer=..., pack=..."),
    ("text:DIR?tokenizer", {}, "has the option 'tokenizer'"),
    ("text:", {}, "names no file or folder; give text:PATH"),
    ("text:DIR", {"image_size": 3}, "takes no --image-size: text has no images; leave it out"),
    ("digits", {"context": 3}, "digits takes no context: only language data such as text:DIR has"),
]


@pytest.mark.parametrize(("source", "options", "said"), BAD)
def test_bad_sources(folder: Path, source: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        load_data(source.replace("DIR", str(folder)), **options)
    assert "\n" not in str(error.value)


def test_documents_of_single_tokens(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="no document of the train part of .* has two tokens"):
        load_data(f"text:{tmp_path}?tokenizer=bytes&pack=no")


def test_names() -> None:
    assert is_text("jsonl:a?field=b") and not is_text("text") and not is_text("a.py:text")
    with pytest.raises(UnknownNameError, match=r"Of text: text:DIR, text:FILE, jsonl:FILE"):
        load_data("texts:a")
