"""The files of a written folder: shards with an index, and copies from the source folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rankNAS.exceptions import UsageError, WriteError
from rankNAS.io.files import read_json, save_atomically, save_bytes
from rankNAS.io.tensors import write_tensors
from rankNAS.search_spaces.zoo.folders import COMPRESSED, CONFIG

__all__ = [
    "MARKER",
    "Source",
    "new_folder",
    "parse_size",
    "write_object",
    "write_shards",
    "write_text",
]

MARKER = "ranknas.json"  # in folders whose other files say nothing of RankNAS
INDEX = "model.safetensors.index.json"
#: Tokenizers and processors of inputs, and the terms of use; names as `fnmatch` takes them.
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
COMMON = {"format": "pt"}  # metadata that readers of this format expect


@dataclass(frozen=True)
class Source:
    """What a written folder takes from elsewhere.

    Args:
        folder: The folder of the dense model, for the files of its tokenizer; None if unknown.
        shard_bytes: The largest size of a shard; a larger tensor has a shard of its own.
    """

    folder: Path | None
    shard_bytes: int = 5 * 10**9

    def copy_to(self, place: Path) -> list[str]:
        """Copy the tokenizer, processors and licences; what is missing, in words."""
        if self.folder is None or not self.folder.is_dir():
            where = "" if self.folder is None else f" {str(self.folder)!r}"
            return [f"no tokenizer: the folder{where} of the dense model is not there"]
        found = {path.name: path for pattern in COPIED for path in self.folder.glob(pattern)}
        for name, path in found.items():
            if path.is_file():
                save_atomically(place / name, partial(_copy, path))
        if not any(re.match(r"tokenizer|vocab|.*processor", name) for name in found):
            return [f"no tokenizer: {str(self.folder)!r} has none"]
        return []


def parse_size(text: str) -> int:
    """Bytes from a number with a unit, such as ``5GB``.

    Raises:
        UsageError: It is none.

    >>> parse_size("1.5MB")
    1500000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * UNITS[(found[2] or "").upper()])
    if size < 1:
        raise UsageError(f"a size must look like 5GB or 500MB, got {text[:50]!r}.")
    return size


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context with a temporary folder that takes the place of another when it is complete.

    Args:
        folder: The folder; it must be empty or missing, or from an earlier export.

    Raises:
        UsageError: The folder has other files.
        WriteError: It cannot be written; an earlier one is intact.
    """
    if os.path.lexists(folder) and not _is_replaceable(folder):
        raise UsageError(
            f"{str(folder)!r} exists and is no earlier export; give a new or empty folder."
        )
    folder = folder.absolute()  # so that it has a name
    unique = f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    place, old = folder.with_name(f"{unique}.tmp"), folder.with_name(f"{unique}.old.tmp")
    try:
        place.mkdir(parents=True)
        yield place
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(place, folder)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"the folder {str(folder)!r} cannot be written: {error.strerror or error}. Give a "
            "place that can be written."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_shards(folder: Path, state: Mapping[str, Tensor], most: int) -> None:
    """Write tensors as one safetensors file, or as shards with an index.

    Args:
        folder: The folder.
        state: The tensors by name; they must not share memory.
        most: The largest size of a shard in bytes.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], COMMON)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, COMMON)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_object(folder / INDEX, index)


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    save_bytes(path, text.encode())


def _copy(path: Path, temporary: Path) -> None:
    with path.open("rb") as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target)


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty or from an earlier export."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()) or (folder / MARKER).is_file():
        return True
    try:
        return COMPRESSED in read_json(folder / CONFIG)
    except (OSError, ValueError, TypeError):
        return False
