from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from language import sentence, text, text_folder

from rankNAS.data.text.documents import read_documents
from rankNAS.exceptions import DataError, UsageError


def write_lines(path: Path, objects: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in objects))
    return path


def test_a_folder_of_texts(tmp_path: Path) -> None:
    text_folder(tmp_path, parts="train test")
    assert [*read_documents("text", str(tmp_path), "text")] == ["train", "test"]
    (tmp_path / "validation.txt").write_text("a b")
    found = read_documents("text", str(tmp_path), "text")
    assert found["valid"].texts == ["a b"] and found["valid"].whole
    assert found["train"].texts == [(tmp_path / "train.txt").read_text()]


@pytest.mark.parametrize("content", [text(400), text(400) + "no line end", "x" * 1000])
def test_a_file_is_split_in_order(tmp_path: Path, content: str) -> None:
    (tmp_path / "all.txt").write_text(content)
    found = read_documents("text", str(tmp_path / "all.txt"), "text")
    parts = [found[name].texts[0] for name in ("train", "valid", "test")]
    assert "".join(parts) == content
    shares = [len(part) / len(content) for part in parts]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert content[0] == "x" or all(part.endswith("\n") for part in parts[:2])


def test_lines_of_json(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", [{"body": sentence(i)} for i in range(20)])
    found = read_documents("jsonl", str(path), "body")
    assert [len(found[n].texts) for n in ("train", "valid", "test")] == [16, 2, 2]
    assert found["test"].texts == [sentence(18), sentence(19)]
    for part in ("train", "test"):
        write_lines(tmp_path / "set" / f"{part}.jsonl", [{"text": part}])
    found = read_documents("jsonl", str(tmp_path / "set"), "text")
    assert found["test"].texts == ["test"] and not found["test"].whole


@pytest.mark.parametrize("split", [True, False])
def test_a_stored_data_set(tmp_path: Path, split: bool) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"body": [sentence(i) for i in range(20)]})
    if split:
        datasets.DatasetDict(
            {"train": one, "validation": one.select(range(3)), "test": one.select([4])}
        ).save_to_disk(tmp_path / "set")
    else:
        one.save_to_disk(tmp_path / "set")
    found = read_documents("datasets", str(tmp_path / "set"), "body")
    counts = [len(found[n].texts) for n in ("train", "valid", "test")]
    assert counts == ([20, 3, 1] if split else [16, 2, 2])
    with pytest.raises(DataError, match=r"has no field 'text' but body; name .* \?field="):
        read_documents("datasets", str(tmp_path / "set"), "text")


BAD = [
    (
        "text",
        "nothing",
        None,
        "there is no file or folder '.*nothing' for text:.*; check",
    ),
    ("text", ".", None, r"no file '.*train\.txt'; text:DIR needs train\.txt and test\.txt, and"),
    ("text", "a.txt", b"", r"a\.txt has no text"),
    ("text", "a.txt", b" \n \n", r"a\.txt has no text"),
    ("text", "a.txt", b"abc\xff\xfe", r"a\.txt is no UTF-8 text \(byte 3\)"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n', r"line 3 of .*a\.jsonl is no JSON"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2 of .* is a list; give one object"),
    ("jsonl", "a.jsonl", b'{"body": "a"}', r"line 1 of .* has no field 'text' but body; name"),
    ("jsonl", "a.jsonl", b'{"text": 3}', r"'text' in line 1 of .* is a int, but must be a text"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n' * 9, "has 9 documents, too few to be split 80/10/10"),
    ("datasets", ".", None, "has no data set that can be read"),
]


@pytest.mark.parametrize(("kind", "name", "content", "said"), BAD)
def test_bad_sources(
    tmp_path: Path, kind: str, name: str, content: bytes | None, said: str
) -> None:
    if kind == "datasets":
        pytest.importorskip("datasets")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_documents(kind, str(tmp_path / name), "text")
    assert "\n" not in str(error.value)


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs datasets: pip install 'ranknas\[hf\]'"):
        read_documents("datasets", str(tmp_path), "text")


def test_a_stored_data_set_without_a_part(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a b"], "n": [1]})
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="has no part 'test' but train"):
        read_documents("datasets", str(tmp_path / "set"), "text")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"'n' in row 0 of .* \(train\) is a int"):
        read_documents("datasets", str(tmp_path / "two"), "n")
