"""Checkpoints: nested tensors and plain values in PyTorch's format, a zip archive.

PyTorch writes a checksum of every part into the archive but does not verify it on reading. This
module verifies it, so a flipped bit gives an error instead of a wrong result. No code in a file
runs.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankNAS.exceptions import WeightsError
from rankNAS.io.files import save_bytes

__all__ = ["check_archive", "read_checkpoint", "write_checkpoint"]

FOLDER = 0x10  # the MS-DOS attribute of a folder


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, atomically.

    Args:
        path: The file.
        content: Its entry ``identity`` identifies the training of the checkpoint.

    Raises:
        WriteError: The file cannot be written; an earlier file is intact.
    """
    buffer = io.BytesIO()  # PyTorch's own writer hides why it failed
    torch.save(dict(content), buffer)
    save_bytes(path, buffer.getbuffer())


def read_checkpoint(
    path: Path, identity: object, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The content written by `write_checkpoint`.

    Args:
        path: The file.
        identity: The required value of its entry ``identity``.
        device: The device of the tensors.

    Raises:
        WeightsError: The file is damaged or of another training.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused
            content: Any = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # a damaged file can raise any error in the reader
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path} is no readable training checkpoint ({reason}); delete it to start anew."
        ) from error
    if not isinstance(content, dict) or content.get("identity") != identity:
        raise WeightsError(
            f"{path} was written by a training with another configuration or other data; delete "
            "it to start anew, or give another path."
        )
    return content


def check_archive(path: Path) -> None:
    """Read all parts of a zip archive and verify their checksums.

    Raises:
        OSError: The file cannot be read.
        ValueError: A part is damaged, or the file is not a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch treats a part with this attribute as a folder and skips its tensor.
            folders = [part.filename for part in archive.infolist() if part.external_attr & FOLDER]
            bad = folders[0] if folders else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged directory can raise any error in the reader
        raise ValueError(f"the archive is damaged: {error}") from error
    if bad is not None:
        raise ValueError(f"the checksum or the mark of its part {bad!r} is wrong")
