"""Documents to tokens; those of long texts are kept on disk by content and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from rankNAS.data.fingerprint import digest
from rankNAS.data.images import cache
from rankNAS.data.text.documents import Documents
from rankNAS.data.text.tokenizers import Tokenizer
from rankNAS.data.text.windows import Array, Tokens
from rankNAS.exceptions import DataError
from rankNAS.io.files import cache_folder

__all__ = ["content_key", "encoded"]

LONG = 1 << 18  # characters from which tokens are kept on disk
PIECE = 1 << 22  # characters that are encoded at once: a token takes some 200 bytes meanwhile
VERSION = "1"


def content_key(documents: Documents, tokenizer: Tokenizer, lines: bool) -> str:
    """A key (hex) of the texts and of all that decides their tokens."""
    form = f"{VERSION} {documents.whole} {lines} {tokenizer.identity}"
    return digest([form.encode(), *(text.encode("utf-8") for text in documents.texts)])[:32]


def encoded(documents: Documents, tokenizer: Tokenizer, *, lines: bool = False) -> Tokens:
    """The tokens of documents.

    Args:
        documents: The documents. Those of a file of their own end with the tokenizer's token for
            that, if it has one.
        tokenizer: The tokenizer.
        lines: Whether each line of a running text is a document; blank ones are left out.

    Raises:
        DataError: The texts have no tokens.
    """
    path: Path | None = None
    if sum(map(len, documents.texts)) >= LONG:
        path = (
            cache_folder() / "tokens" / f"{content_key(documents, tokenizer, lines)}.safetensors"
        )
        kept = cache.read(path, "the tokens of a text")
        if kept is not None:
            tensors, _ = kept
            return Tokens(tensors["ids"].numpy(), tensors["ends"].numpy())
    ids, ends = _encode(documents, tokenizer, lines)
    if not len(ids):
        raise DataError(f"{documents.name} has no tokens; give one with some text.")
    if path is not None:
        tensors = {"ids": torch.from_numpy(ids), "ends": torch.from_numpy(ends)}
        cache.write(path, tensors, {"tokenizer": tokenizer.name}, "the tokens of a text")
    return Tokens(ids, ends)


def _encode(documents: Documents, tokenizer: Tokenizer, lines: bool) -> tuple[Array, Array]:
    """All ids, int32, and the ends of the documents, int64."""
    parts: list[Array] = []
    ends: list[int] = []
    size = 0
    for text in _texts(documents, lines):
        for number, piece in enumerate(_pieces(text)):
            ids = tokenizer.encode(piece, special=not number)
            parts.append(np.asarray(ids, dtype=np.int32))
            size += len(ids)
        if not documents.whole and tokenizer.end is not None:
            if not (ids and ids[-1] == tokenizer.end):
                parts.append(np.asarray([tokenizer.end], dtype=np.int32))
                size += 1
        ends.append(size)
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return whole, np.asarray(ends, dtype=np.int64)


def _texts(documents: Documents, lines: bool) -> Iterable[str]:
    """The documents that are encoded one by one."""
    if documents.whole and not lines:
        return documents.texts
    if documents.whole:
        return (line for text in documents.texts for line in text.splitlines() if line.strip())
    return (text for text in documents.texts if text.strip())


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, which end with lines where they can."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1
        # Tokenizers join line breaks with the spaces that follow.
        while cut > start + 1 and text[cut].isspace():
            cut = text.rfind("\n", start, cut - 1) + 1
        cut = cut if cut > start else start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]
