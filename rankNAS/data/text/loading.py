"""Language data from a source by name: windows of tokens for training, validation and test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankNAS.data.base import Data, TextForm
from rankNAS.data.fingerprint import digest, sampled_bytes
from rankNAS.data.samples import Samples
from rankNAS.data.text.arrays import read_arrays
from rankNAS.data.text.documents import read_documents
from rankNAS.data.text.encoding import content_key, encoded
from rankNAS.data.text.masking import SHARE, Masked
from rankNAS.data.text.tokenizers import BYTES, Tokenizer, tokenizer_of
from rankNAS.data.text.windows import Array, Tokens, Windows, overlapping, packed, padded
from rankNAS.exceptions import DataError, UsageError

__all__ = ["CONTEXT", "FORMS", "is_text", "load_text"]

CONTEXT = 1024  # tokens of a window, if the model takes as many
KINDS = ("text", "jsonl", "tokens", "datasets")
FORMS = ("text:DIR", "text:FILE", "jsonl:FILE?field=text", "tokens:DIR", "datasets:DIR")
#: The options of each kind of source.
OPTIONS = {
    "text": ("tokenizer", "pack", "mask"),
    "jsonl": ("tokenizer", "pack", "mask", "field"),
    "datasets": ("tokenizer", "pack", "mask", "field"),
    "tokens": ("tokenizer", "mask"),
}
SAMPLED = 1 << 24  # ids that are looked at at once


def is_text(source: object) -> bool:
    """Whether a source names language data.

    >>> is_text("text:books"), is_text("digits")
    (True, False)
    """
    return isinstance(source, str) and source.partition(":")[0] in KINDS and ":" in source


def load_text(
    source: str,
    *,
    tokenizer: str | Tokenizer | None = None,
    context: int | None = None,
    stride: int | None = None,
    mask: float | None = None,
) -> Data:
    """The windows of a source, named ``KIND:PATH?OPTION=VALUE&...``.

    Args:
        source: One of `FORMS`. Options are ``tokenizer`` (a Hugging Face folder, or ``bytes``),
            ``field`` (the entry with the text), ``pack`` (``no`` for one padded item for each
            document, or for each line of a running text, rather than windows of `context`) and
            ``mask`` (the share of the tokens that are hidden, for masked language models).
        tokenizer: The tokenizer, unless the source names one.
        context: Tokens of a window, at least 2; by default 1,024, or those of stored windows.
        stride: Begin the windows of validation and test data so many tokens after each other, and
            count only what is new in each; by default they do not overlap.
        mask: The share of hidden tokens, unless the source states it; by default none is.

    Raises:
        DataError: The source is missing, malformed or too short.
        UsageError: There is no tokenizer, or a package is missing.
    """
    parsed = _Source.of(source)
    _check(context, stride)
    share = parsed.share(mask)
    given = parsed.options.get("tokenizer", tokenizer)
    if parsed.kind == "tokens":
        if share is None:
            given = parsed.options.get("tokenizer")
        return _of_arrays(source, parsed, context, stride, given, share)
    if given is None:
        raise UsageError(
            f"{source} needs a tokenizer; give {_with(source, 'tokenizer=FOLDER')} with a Hugging "
            f"Face folder, or {_with(source, f'tokenizer={BYTES}')} for one token a byte."
        )
    found = tokenizer_of(given)
    length = context or CONTEXT
    documents = read_documents(parsed.kind, parsed.path, parsed.options.get("field", "text"))
    lines = not parsed.packs
    if lines and stride is not None:
        raise DataError(
            f"{source} has windows of single documents, which do not overlap; leave out the "
            "stride, or pack=no."
        )
    parts = {name: encoded(part, found, lines=lines) for name, part in documents.items()}
    if parsed.packs:
        windows = {
            name: _packed(name, part, length, stride, documents[name].name)
            for name, part in parts.items()
        }
    else:
        windows = _padded(parts, length, found.padding or 0, source)
    keys = [f"{n} {content_key(part, found, lines)}" for n, part in documents.items()]
    most = max(int(part.ids.max()) for part in parts.values())
    form = TextForm(next(iter(windows.values())).length, most, found.vocabulary, found.name)
    keys = [*keys, str(length), str(stride), str(lines)]
    return _data(source, _masked(windows, share, found), form, keys, share)


@dataclass(frozen=True)
class _Source:
    """The parts of a source's name."""

    kind: str
    path: str
    options: dict[str, str]

    @classmethod
    def of(cls, source: str) -> _Source:
        kind, _, rest = source.partition(":")
        path, _, query = rest.partition("?")
        if not path:
            raise DataError(f"{source!r} names no file or folder; give {kind}:PATH.")
        options = {}
        for entry in filter(None, query.split("&")):
            name, sign, value = entry.partition("=")
            if name not in OPTIONS[kind] or not sign or not value:
                raise DataError(
                    f"{source!r} has the option {entry!r}; {kind}:PATH takes "
                    f"{', '.join(f'{known}=...' for known in OPTIONS[kind])}."
                )
            options[name] = value
        if options.get("pack", "yes") not in ("yes", "no"):
            raise DataError(f"{source!r} has pack={options['pack']}; give pack=yes or pack=no.")
        return cls(kind, path, options)

    def share(self, default: float | None) -> float | None:
        """The share of hidden tokens; None for none.

        Raises:
            DataError: It is not above 0 and below 1.
        """
        stated = self.options.get("mask")
        try:
            share = default if stated is None else float(stated)
        except ValueError:
            share = math.nan
        if share is None or stated in ("0", "no"):
            return None
        if not 0 < share < 1:
            raise DataError(
                f"the share of masked tokens is {stated or share}; give a number above 0 and "
                f"below 1, such as mask={SHARE}, or mask=no."
            )
        return share

    @property
    def packs(self) -> bool:
        """Whether windows go across documents."""
        return self.options.get("pack", "yes") == "yes"


def _with(source: str, option: str) -> str:
    return f"{source}{'&' if '?' in source else '?'}{option}"


def _check(context: int | None, stride: int | None) -> None:
    if context is not None and (type(context) is not int or context < 2):
        raise DataError(f"the context is {context!r}; give at least 2 tokens, such as {CONTEXT}.")
    if stride is None:
        return
    if type(stride) is not int or not 1 <= stride <= (context or CONTEXT):
        raise DataError(
            f"the stride is {stride!r}; give a number of tokens from 1 to the context, "
            f"{context or CONTEXT}."
        )


def _packed(name: str, tokens: Tokens, length: int, stride: int | None, where: str) -> Windows:
    """The windows of one part; training windows never overlap."""
    if len(tokens.ids) < length:
        raise DataError(
            f"{where} has {len(tokens.ids)} tokens, less than one window of {length}; give more "
            "text, or a smaller --context."
        )
    if stride is None or name == "train":
        return packed(tokens, length, labelled=stride is not None)
    return overlapping(tokens, length, stride)


def _padded(
    parts: dict[str, Tokens], length: int, padding: int, source: str
) -> dict[str, Windows]:
    """One window for each document, as long as the longest one but at most `length`."""
    longest = max(int(np.diff(part.ends, prepend=0).max()) for part in parts.values())
    windows = {n: padded(part, min(length, longest), padding) for n, part in parts.items()}
    for name, found in windows.items():
        if not len(found):
            raise DataError(
                f"no document of the {name} part of {source} has two tokens; give longer ones."
            )
    return windows


def _of_arrays(
    source: str,
    parsed: _Source,
    context: int | None,
    stride: int | None,
    given: str | Tokenizer | None,
    share: float | None,
) -> Data:
    """The data of stored windows, each cut into windows of `context` if that is smaller."""
    if stride is not None:
        raise DataError(
            f"{source} has windows of its own, so a stride has no effect; leave it out."
        )
    arrays = read_arrays(parsed.path)
    stored = next(iter(arrays.values())).shape[1]
    length = stored if context is None else context
    if length > stored:
        raise DataError(
            f"{source} has windows of {stored} tokens, less than the context of {length}; give "
            f"--context {stored} or less."
        )
    known = None if given is None else tokenizer_of(given)
    most = max(_largest(array, f"{parsed.path} ({name})") for name, array in arrays.items())
    windows = {}
    for name, array in arrays.items():
        firsts = np.arange(len(array))[:, None] * stored
        starts = (firsts + np.arange(stored // length)[None] * length).reshape(-1)
        windows[name] = Windows(array.reshape(-1), starts, length)
    keys = [f"{n} {digest(sampled_bytes(Samples.of(x)))}" for n, x in windows.items()]
    vocabulary = None if known is None else known.vocabulary
    form = TextForm(length, most, vocabulary, None if known is None else known.name)
    if share is not None and known is None:
        raise UsageError(
            f"{source} needs a tokenizer to mask tokens; give {_with(source, 'tokenizer=FOLDER')}."
        )
    masked = windows if known is None else _masked(windows, share, known)
    return _data(source, masked, form, keys, share)


def _masked(
    windows: dict[str, Windows], share: float | None, tokenizer: Tokenizer
) -> dict[str, Windows] | dict[str, Masked]:
    if share is None:
        return windows
    return {name: Masked(part, share, tokenizer) for name, part in windows.items()}


def _largest(array: Array, where: str) -> int:
    """The largest id; raises a DataError for a negative one."""
    rows = max(1, SAMPLED // array.shape[1])
    parts = [array[start : start + rows] for start in range(0, len(array), rows)]
    least = min(int(part.min()) for part in parts)
    if least < 0:
        raise DataError(f"{where} has the token id {least}; ids begin with 0.")
    return max(int(part.max()) for part in parts)


def _data(
    source: str,
    windows: dict[str, Windows] | dict[str, Masked],
    form: TextForm,
    keys: list[Any],
    share: float | None,
) -> Data:
    if share is not None:
        keys = [*keys, f"mask {share}"]
    return Data(
        name=source,
        train=Samples.of(windows["train"], where="train"),
        test=Samples.of(windows["test"], where="test"),
        input_shape=None,
        num_classes=form.vocabulary or form.largest + 1,
        fingerprint=digest(str(key).encode() for key in keys)[:16],
        valid=Samples.of(windows["valid"], where="valid") if "valid" in windows else None,
        text=form,
    )
