from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from language import text, tokenizer_folder

from rankNAS.data.text import encoding
from rankNAS.data.text.documents import Documents
from rankNAS.data.text.encoding import content_key, encoded
from rankNAS.data.text.tokenizers import ByteTokenizer, load_tokenizer
from rankNAS.exceptions import DataError


class Counting:
    """A byte tokenizer that counts its calls."""

    vocabulary, name, identity = 256, "counting", "counting"
    padding: int | None = 0
    end: int | None = 0

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.calls += 1
        return [1] * special + list(text.encode())


def test_a_running_text_is_one_document() -> None:
    found = encoded(Documents(["ab\n\ncd"], True, "a"), ByteTokenizer())
    assert bytes(found.ids.tolist()) == b"ab\n\ncd" and found.ends.tolist() == [6]
    assert found.ids.dtype == np.int32
    lines = encoded(Documents(["ab\n\ncde"], True, "a"), ByteTokenizer(), lines=True)
    assert bytes(lines.ids.tolist()) == b"abcde" and lines.ends.tolist() == [2, 5]


def test_documents_end_with_the_token_for_that() -> None:
    found = encoded(Documents(["ab", " ", "c\0"], False, "a"), ByteTokenizer())
    assert bytes(found.ids.tolist()) == b"ab\0c\0" and found.ends.tolist() == [3, 5]


def test_a_long_text_in_pieces_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder(tmp_path, start=True)))
    documents = Documents([text(80)], True, "a")
    whole = encoded(documents, tokenizer).ids
    assert int((whole == 1).sum()) == 1
    for size in (50, 100, 333):
        monkeypatch.setattr(encoding, "PIECE", size)
        assert np.array_equal(encoded(documents, tokenizer).ids, whole)


def test_tokens_of_long_texts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "LONG", 100)
    tokenizer = Counting()
    documents = Documents([text(30)], True, "a")
    first, calls = encoded(documents, tokenizer), tokenizer.calls
    again = encoded(documents, tokenizer)
    assert tokenizer.calls == calls and np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.ends, again.ends) and again.ids.dtype == np.int32
    encoded(documents, tokenizer, lines=True)
    assert tokenizer.calls > calls
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    next((tmp_path / "tokens").iterdir()).write_bytes(b"damaged")
    assert np.array_equal(encoded(documents, tokenizer).ids, first.ids)
    monkeypatch.setenv("RANKNAS_IMAGE_CACHE_GB", "0")
    calls = tokenizer.calls
    encoded(documents, tokenizer)
    assert tokenizer.calls > calls


def test_keys_depend_on_content_tokenizer_and_form() -> None:
    plain = Documents(["ab", "c"], False, "here")
    keys = {
        content_key(plain, ByteTokenizer(), False),
        content_key(plain, Counting(), False),
        content_key(Documents(["a", "bc"], False, "here"), ByteTokenizer(), False),
        content_key(Documents(["ab", "c"], True, "here"), ByteTokenizer(), False),
        content_key(Documents(["ab", "c"], True, "here"), ByteTokenizer(), True),
    }
    assert len(keys) == 5
    there = Documents(["ab", "c"], False, "there")
    assert content_key(there, ByteTokenizer(), False) in keys


def test_no_tokens() -> None:
    class Nothing(Counting):
        def encode(self, text: str, *, special: bool = True) -> list[int]:
            return []

    with pytest.raises(DataError, match="here has no tokens"):
        encoded(Documents(["ab"], True, "here"), Nothing())
