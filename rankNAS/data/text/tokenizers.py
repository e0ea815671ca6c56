"""Tokenizers: of a Hugging Face folder, or one token a byte."""

from __future__ import annotations

import json
import os
from typing import Any, Protocol, final

from rankNAS.data.fingerprint import digest
from rankNAS.exceptions import UsageError, shortened

__all__ = ["BYTES", "ByteTokenizer", "Tokenizer", "load_tokenizer", "tokenizer_of"]

BYTES = "bytes"  #: The name of the tokenizer that needs no files.


class Tokenizer(Protocol):
    """Text to token ids.

    Attributes:
        vocabulary: The number of token ids.
        name: Its name in messages.
        padding: The id of padding; None if there is none.
        end: The id that ends a document; None if there is none.
        identity: A key of all that decides the ids; equal ones give equal ids.

    For masked language models it also has ``mask``, the id that hides a token, and ``special``,
    the ids that are never hidden.
    """

    vocabulary: int
    name: str
    padding: int | None
    end: int | None
    identity: str

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: The text.
            special: Whether to add the special tokens of a document, such as one for its start.
        """


def tokenizer_of(given: str | Tokenizer) -> Tokenizer:
    """The tokenizer for ``bytes``, for a folder, or the given one.

    Raises:
        UsageError: The folder has no tokenizer.
    """
    if not isinstance(given, str):
        return given
    return ByteTokenizer() if given == BYTES else load_tokenizer(given)


@final
class ByteTokenizer:
    """One token for each byte of UTF-8. The byte 0, which no text has, ends a document.

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
    """

    vocabulary = 256
    name = identity = BYTES
    padding: int | None = 0
    end: int | None = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode("utf-8"))


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: The folder, perhaps with ``?gguf_file=FILE`` for the tokenizer in such a file.

    Raises:
        UsageError: transformers is missing, or the folder has no tokenizer that can be read.
    """
    path, _, query = folder.partition("?")
    key, _, file = query.partition("=")
    if query and (key != "gguf_file" or not file):
        raise UsageError(
            f"the tokenizer {folder!r} takes no {query!r}; give FOLDER, or FOLDER?gguf_file=FILE."
        )
    if not os.path.isdir(path):
        raise UsageError(
            f"there is no folder {path!r} with a tokenizer; give a Hugging Face folder, or "
            f"'{BYTES}' for one token a byte."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"the tokenizer of {path!r} needs transformers: pip install 'ranknas[hf]'"
        ) from error
    options = {"gguf_file": file} if file else {}
    try:
        found = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the libraries behind it raise errors of any kind
        raise UsageError(
            f"the folder {path!r} has no tokenizer that can be read ({_one_line(error)}); it "
            "needs tokenizer.json or the files of the tokenizer's class."
        ) from error
    return _HuggingFace(found, path)


@final
class _HuggingFace:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any, folder: str) -> None:
        self._tokenizer = tokenizer
        self.name = folder
        self.vocabulary = len(tokenizer)
        self.end: int | None = tokenizer.eos_token_id
        if self.end is None:
            self.end = tokenizer.sep_token_id
        self.padding: int | None = tokenizer.pad_token_id
        if self.padding is None:
            self.padding = self.end
        self.mask: int | None = tokenizer.mask_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.identity = _identity(tokenizer)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        found: list[int] = self._tokenizer(
            text,
            add_special_tokens=special,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return found


def _identity(tokenizer: Any) -> str:
    """A key of the tokenizer's content, whatever folder it comes from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        stated = json.loads(backend.to_str())
        stated.pop("truncation", None)  # which a call changes
        stated.pop("padding", None)
        content = json.dumps(stated, sort_keys=True)
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    kind = type(tokenizer).__name__
    return digest(part.encode() for part in (kind, content, special))[:32]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 200)}"
