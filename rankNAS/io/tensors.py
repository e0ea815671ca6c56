"""Safetensors files with a checksum, which the format itself lacks.

The checksum is stored in the metadata and covers the tensors and the other metadata. Files without
a checksum, such as those of other programs, are read unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rankNAS.exceptions import WeightsError
from rankNAS.io.files import save_atomically
from rankNAS.io.fingerprints import content_of, fingerprint

__all__ = ["CHECKSUM", "damaged", "encoded", "read_tensors", "write_tensors"]

CHECKSUM = "ranknas:sha256"
#: The names of types in the format.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file, with a checksum.

    Args:
        tensors: Tensors by name; they must not share memory.
        metadata: Texts by name.

    >>> content = encoded({"a": torch.zeros(2)}, {"made": "today"})
    >>> b"ranknas:sha256" in content and b"today" in content
    True
    """
    return b"".join(_parts(tensors, metadata))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum, atomically and one tensor at a time.

    Raises:
        WriteError: The file cannot be written; an earlier file is intact.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for part in _parts(tensors, metadata):
                file.write(part)

    save_atomically(path, write)


def _parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    """The content of a file: the header, then the tensors, widest types first."""
    texts = {name: text for name, text in (metadata or {}).items() if name != CHECKSUM}
    header: dict[str, Any] = {"__metadata__": texts | {CHECKSUM: _checksum(tensors, texts)}}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        kind = TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for name in names:
        yield content_of(tensors[name])


def read_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        WeightsError: The file is missing, damaged or of another kind, or its checksum is wrong.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except Exception as error:  # a damaged header can raise any error in the reader
        raise damaged(path, error) from error
    expected = metadata.get(CHECKSUM)
    texts = {name: text for name, text in metadata.items() if name != CHECKSUM}
    if expected is not None and _checksum(tensors, texts) != expected:
        raise WeightsError(
            f"{path} does not match its checksum: it was damaged, or changed by a program that "
            f"kept the entry {CHECKSUM!r} of its metadata; make or fetch the file again."
        )
    return tensors, metadata


def damaged(path: Path, error: Exception) -> WeightsError:
    """The error for an unreadable weights file."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return WeightsError(
        f"{path} is truncated or no weights file ({reason}); expected safetensors or a torch "
        "state dict, so fetch or save it again."
    )


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    # Sorted: files list the names in an order that depends on type alignment.
    return fingerprint(dict(sorted(tensors.items())), json.dumps(texts, sort_keys=True))
