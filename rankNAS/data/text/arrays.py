"""Windows of token ids from files of arrays, which stay on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rankNAS.data.text.documents import PARTS
from rankNAS.data.text.windows import Array
from rankNAS.exceptions import DataError

__all__ = ["read_arrays"]


def read_arrays(path: str) -> dict[str, Array]:
    """The windows (w, T) of each part: ``train``, ``test`` and perhaps ``valid``.

    Args:
        path: A folder with ``train.npy``, ``test.npy`` and perhaps ``valid.npy``.

    Raises:
        DataError: A file is missing, or has no integers of this shape.
    """
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path!r} for tokens:{path}; check the path.")
    found = {}
    for part, names in PARTS.items():
        files = [Path(path) / f"{name}.npy" for name in names]
        existing = next((file for file in files if file.is_file()), None)
        if existing is not None:
            found[part] = _read(existing)
        elif part != "valid":
            raise DataError(
                f"there is no file {str(files[0])!r}; tokens:DIR needs train.npy and test.npy, "
                "and takes valid.npy."
            )
    lengths = {name: array.shape[1] for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        stated = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"the windows in {path} differ in length: {stated}; make them equal.")
    return found


def _read(path: Path) -> Array:
    try:
        array: Array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is no array that can be read ({error}); write it with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", type(array).__name__)
        raise DataError(
            f"{path} holds {kind}, but token ids are integers; save them as int32, for example."
        )
    if array.ndim != 2:
        raise DataError(
            f"{path} has the shape {array.shape}; save the tokens as windows x length."
        )
    if not array.size or array.shape[1] < 2:
        raise DataError(
            f"{path} has the shape {array.shape}; give at least one window of two tokens."
        )
    return array
