"""Documents of text: of text files, JSON lines and stored `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankNAS.exceptions import DataError, UsageError, shortened

__all__ = ["Documents", "PARTS", "read_documents"]

#: The parts of a source with the names that they may have; only the last may be absent.
PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "test": ("test",),
    "valid": ("valid", "validation"),
}
SHARES = {"train": (0, 8), "valid": (8, 9), "test": (9, 10)}  # tenths of a source that is split


@dataclass(frozen=True)
class Documents:
    """The documents of one part.

    Args:
        texts: The documents.
        whole: Whether they are one running text, whose documents are its lines.
        name: Their source in messages.
    """

    texts: Sequence[str]
    whole: bool
    name: str


def read_documents(kind: str, path: str, field: str) -> dict[str, Documents]:
    """The documents of each part of a source: ``train``, ``test`` and perhaps ``valid``.

    Args:
        kind: ``text``, ``jsonl`` or ``datasets``.
        path: The file or folder. A file is split 80/10/10 in order.
        field: The entry with the text, for the last two kinds.

    Raises:
        DataError: A file is missing, empty, or not of this kind.
        UsageError: The package ``datasets`` is missing.
    """
    place = Path(path)
    if not os.path.exists(path):
        raise DataError(f"there is no file or folder {path!r} for {kind}:{path}; check the path.")
    if kind == "datasets":
        found = {n: Documents(x, False, f"{path} ({n})") for n, x in _stored(place, field).items()}
    elif place.is_dir():
        found = {n: _read(kind, file, field) for n, file in _files(place, kind).items()}
    else:
        found = _divided(_read(kind, place, field))
    for part in found.values():
        if not any(text.strip() for text in part.texts):
            raise DataError(f"{part.name} has no text; give one with some documents.")
    return found


def _files(folder: Path, kind: str) -> dict[str, Path]:
    """The file of each part in a folder."""
    ending = "txt" if kind == "text" else "jsonl"
    found = {}
    for part, names in PARTS.items():
        paths = [folder / f"{name}.{ending}" for name in names]
        existing = next((path for path in paths if path.is_file()), None)
        if existing is not None:
            found[part] = existing
        elif part != "valid":
            raise DataError(
                f"there is no file {str(paths[0])!r}; {kind}:DIR needs train.{ending} and "
                f"test.{ending}, and takes valid.{ending}."
            )
    return found


def _read(kind: str, path: Path, field: str) -> Documents:
    if kind == "text":
        return Documents([_text_of(path)], True, str(path))
    return Documents(list(_json_texts(path, field)), False, str(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start}); convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the file.") from error


def _json_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file with one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is no JSON ({error}); give one object a line."
            ) from error
        yield _field_of(value, field, f"line {number} of {path}")


def _field_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is a {type(value).__name__}; give one object a line, such as "
            '{"text": "..."}.'
        )
    if field not in value:
        known = ", ".join(map(str, list(value)[:8])) or "no fields"
        raise DataError(
            f"{where} has no field {field!r} but {known}; name the one with the text by ?field=."
        )
    text = value[field]
    if not isinstance(text, str):
        raise DataError(
            f"the field {field!r} in {where} is a {type(text).__name__}, but must be a text; name "
            "another one by ?field=."
        )
    return text


def _divided(whole: Documents) -> dict[str, Documents]:
    """The parts of one source, in order: a running text is cut at ends of lines."""
    if not whole.whole:
        n = len(whole.texts)
        if n < 10:
            raise DataError(
                f"{whole.name} has {n} documents, too few to be split 80/10/10; give a folder "
                "with a file for each part."
            )
        cuts = [n * tenth // 10 for tenth in range(11)]
        pieces: dict[str, Iterable[str]] = {
            part: whole.texts[cuts[a] : cuts[b]] for part, (a, b) in SHARES.items()
        }
    else:
        text = whole.texts[0]
        cuts = [_line_end(text, len(text) * tenth // 10) for tenth in range(11)]
        pieces = {part: [text[cuts[a] : cuts[b]]] for part, (a, b) in SHARES.items()}
    return {
        part: Documents(list(texts), whole.whole, f"the {part} part of {whole.name}")
        for part, texts in pieces.items()
    }


def _line_end(text: str, place: int) -> int:
    """The end of the line before a place; the place itself if that line begins far before it."""
    found = text.rfind("\n", 0, place) + 1
    if place == len(text):
        return place
    return found if place - found < len(text) // 20 else place


def _stored(folder: Path, field: str) -> dict[str, Sequence[str]]:
    """The texts of a data set that `datasets` saved."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"datasets:{folder} needs datasets: pip install 'ranknas[hf]'") from error
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the libraries behind it raise errors of any kind
        why = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 200)}"
        raise DataError(
            f"{folder} has no data set that can be read ({why}); save one with save_to_disk."
        ) from error
    if not isinstance(found, Mapping):
        divided = _divided(Documents(_column(found, field, str(folder)), False, str(folder)))
        return {part: documents.texts for part, documents in divided.items()}
    parts: dict[str, Sequence[str]] = {}
    for part, names in PARTS.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            parts[part] = _column(found[name], field, f"{folder} ({name})")
        elif part != "valid":
            known = ", ".join(map(str, found))
            raise DataError(f"{folder} has no part {part!r} but {known}; save one of that name.")
    return parts


def _column(dataset: Any, field: str, where: str) -> list[str]:
    """One column, as texts."""
    if field not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise DataError(
            f"{where} has no field {field!r} but {known}; name the one with the text by ?field=."
        )
    texts = list(dataset[field])
    bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if bad is not None:
        raise DataError(
            f"the field {field!r} in row {bad} of {where} is a {type(texts[bad]).__name__}, but "
            "must be a text; name another one by ?field=."
        )
    return texts
