"""Reading of weights files: safetensors, whole or in parts, and what `torch.save` wrote.

No code of a file runs: a torch file is read by PyTorch's restricted unpickler, and values of other
kinds beside the weights are replaced by empty objects.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from rankNAS.exceptions import WeightsError
from rankNAS.io.checkpoints import check_archive
from rankNAS.io.files import read_json
from rankNAS.io.tensors import damaged, read_tensors

__all__ = ["read_weights"]

INDEX = ".index.json"  # the end of the name of an index of parts


def read_weights(path: Path | str) -> tuple[Any, dict[str, str]]:
    """The content of a weights file, and its metadata.

    Args:
        path: A safetensors file; a torch file; an index of parts (``*.index.json``); or the
            folder of one of these.

    Returns:
        The tensors by name, or a container of them; the metadata of a safetensors file, empty for
        any other.

    Raises:
        WeightsError: The file is missing or damaged, or loading it could run code.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike the methods of Path, it accepts any text
        path = _file_in(path)
    if not os.path.isfile(path):
        raise WeightsError(f"there is no weights file {path}; check the path.")
    if path.name.endswith(INDEX):
        return _read_parts(path), {}
    if path.suffix == ".safetensors":
        return read_tensors(path)
    return _read_torch(path), {}


def _file_in(folder: Path) -> Path:
    """The index of a folder, or its only safetensors file."""
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise WeightsError(
        f"{folder} is a folder without exactly one index of parts (*{INDEX}) or one safetensors "
        "file; give the path of the file."
    )


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors that an index distributes over several files of its folder."""
    try:
        content = read_json(index)["weight_map"]
        parts: dict[str, list[str]] = {}
        for name, file in content.items():
            parts.setdefault(file, []).append(name)
        outside = [file for file in parts if Path(file).name != file]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); expected JSON "
            "with the file of each tensor under 'weight_map'."
        ) from error
    if outside:
        raise WeightsError(f"{index} names {outside[0]!r}, which is not a file of its folder.")
    tensors: dict[str, Tensor] = {}
    for file, names in parts.items():
        part = index.with_name(file)
        if not os.path.isfile(part):
            raise WeightsError(f"{part}, named by {index.name}, is missing; fetch it.")
        found = read_tensors(part)[0] if part.suffix == ".safetensors" else _read_torch(part)
        for name in names:
            tensor = found.get(name) if isinstance(found, dict) else None
            if not isinstance(tensor, Tensor):
                raise WeightsError(
                    f"{part} lacks {name!r}, which {index.name} says it has; fetch both again."
                )
            tensors[name] = tensor
    return tensors


def _read_torch(path: Path) -> Any:
    """What `torch.save` wrote, with an empty object for each harmless value of another kind."""
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings(), safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # about pickles that are refused below
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) and _is_pickle(path):
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise WeightsError(
                f"{path} was refused, because loading it could run code: it is not a plain dict "
                f"of tensors{'' if found is None else f' but holds a {found[1][:80]}'}; save "
                "model.state_dict(), best as safetensors."
            ) from error
        raise damaged(path, error) from error
    except Exception as error:  # invalid bytes can raise any error in the reader
        raise damaged(path, error) from error


def _is_pickle(path: Path) -> bool:
    """Whether the file starts like a pickle or a zip archive, unlike text."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


class _Value:
    """Stands for a value beside the weights, whose content is not needed."""

    def __init__(self, *content: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _mapping(*factory: object) -> OrderedDict[Any, Any]:
    """Stands for ``collections.defaultdict``."""
    return OrderedDict()


def _sequence(*content: object) -> list[Any]:
    """Stands for ``collections.deque``."""
    return []


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct")
#: Names in a torch file of harmless classes and functions, by the module.
_NAMES: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "builtins": ("dict", "float", "frozenset", "int", "list", "range", "slice"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "numpy": ("dtype", "ndarray"),
    "numpy._core": _NUMPY,
    "numpy.core": _NUMPY,
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch.torch_version": ("TorchVersion",),
    "types": ("SimpleNamespace",),
    "uuid": ("UUID",),
}
#: What is called in place of each of them.
_HARMLESS: list[Any] = [
    *((_Value, f"{module}.{name}") for module, names in _NAMES.items() for name in names),
    (_mapping, "collections.defaultdict"),
    (_sequence, "collections.deque"),
    # Lightning's dicts of hyperparameters.
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]
