from __future__ import annotations

import sys
from pathlib import Path

import pytest
from language import tokenizer_folder

from rankNAS.data.text.tokenizers import ByteTokenizer, load_tokenizer, tokenizer_of
from rankNAS.exceptions import UsageError


def test_bytes_need_no_files() -> None:
    found = tokenizer_of("bytes")
    assert (found.vocabulary, found.name, found.end, found.padding) == (256, "bytes", 0, 0)
    assert bytes(found.encode("né\n")).decode() == "né\n"
    given = ByteTokenizer()
    assert tokenizer_of(given) is given


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    found = load_tokenizer(str(tokenizer_folder(tmp_path / "plain")))
    assert found.vocabulary == 20
    assert (found.end, found.padding) == (2, 3)
    assert found.encode("the cat") == [6, 7]
    begins = load_tokenizer(str(tokenizer_folder(tmp_path / "start", start=True)))
    assert begins.encode("the cat") == [1, 6, 7]
    assert begins.encode("the cat", special=False) == [6, 7]
    again = load_tokenizer(str(tokenizer_folder(tmp_path / "again")))
    assert found.identity == again.identity != begins.identity


def test_a_long_text_is_not_cut_and_not_complained_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer_folder(tmp_path)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(
        settings.replace("{", '{"model_max_length": 4,', 1)
    )
    found = load_tokenizer(str(tmp_path))
    assert len(found.encode("the cat sat on a mat")) == 6
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "missing",
            r"there is no folder '.*missing' with a tokenizer; give a Hugging",
        ),
        ("empty", r"'.*empty' has no tokenizer that can be read \("),
        ("empty?revision=2", "takes no 'revision=2'; give FOLDER, or FOLDER\\?gguf_file=FILE"),
    ],
)
def test_folders_without_a_tokenizer(tmp_path: Path, name: str, said: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=said) as error:
        load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"needs transformers: pip install 'ranknas\[hf\]'"):
        load_tokenizer(str(tmp_path))
