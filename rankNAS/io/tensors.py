"""Safetensors files with a checksum, which the format itself lacks.

The checksum is stored in the metadata and covers the tensors and the other metadata. Files without
a checksum, such as those of other programs, are read unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rankNAS.exceptions import WeightsError
from rankNAS.io.files import save_atomically, save_bytes
from rankNAS.io.fingerprints import fingerprint

__all__ = ["CHECKSUM", "TYPES", "damaged", "encoded", "read_tensors", "write_tensors"]

CHECKSUM = "ranknas:sha256"
ALIGNMENT = 8  # bytes
#: The names of data types in the format.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
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
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {name: text for name, text in (metadata or {}).items() if name != CHECKSUM}
    content: bytes = save(given, texts | {CHECKSUM: _checksum(given, texts)})
    return content


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum, atomically and without a copy of the tensors.

    Raises:
        WriteError: The file cannot be written; an earlier file is intact.
    """
    if any(tensor.dtype not in TYPES for tensor in tensors.values()):
        save_bytes(path, encoded(tensors, metadata))
        return
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {name: text for name, text in (metadata or {}).items() if name != CHECKSUM}
    texts[CHECKSUM] = _checksum(given, texts)
    save_atomically(path, lambda temporary: _stream(temporary, given, texts))


def _stream(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a safetensors file: the length of the header, the header, and the tensors in turn."""
    # Wide types come first, so that every tensor begins at a multiple of the size of its type.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        kind = TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


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
