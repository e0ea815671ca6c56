"""Hugging Face folders: their names with options, and checks of their files."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from safetensors import safe_open

from rankNAS.exceptions import UsageError, WeightsError, shortened
from rankNAS.io.files import read_json
from rankNAS.io.tensors import damaged

__all__ = ["COMPRESSED", "CONFIG", "DTYPES", "FolderSpec", "check_config", "check_weights"]

CONFIG = "config.json"
COMPRESSED = "ranknas"  # the entry of a configuration that holds an allocation
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class FolderSpec:
    """A folder, as in ``FOLDER?dtype=bfloat16``.

    Args:
        folder: The folder.
        gguf_file: The name of a GGUF file in it that has the weights and the configuration.
        dtype: The data type of the loaded weights; None for that of the files.
    """

    folder: Path
    gguf_file: str | None = None
    dtype: str | None = None

    @classmethod
    def parse(cls, text: str) -> FolderSpec:
        """A folder with options.

        Raises:
            UsageError: There is no such folder or file, or an option is unknown.

        >>> FolderSpec.parse(".?dtype=bfloat16").dtype
        'bfloat16'
        """
        place, _, query = text.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(options.keys() - {"gguf_file", "dtype"})
        if unknown or (query and not options):
            raise UsageError(
                f"hf:{text} has the unknown option {(unknown or [query])[0]!r}; known: gguf_file, "
                "dtype, as in hf:FOLDER?dtype=bfloat16."
            )
        spec = cls(Path(os.path.expanduser(place)), **options)
        if not place or not os.path.isdir(spec.folder):
            raise UsageError(
                f"there is no folder {place!r}; give hf:FOLDER with the files of a model, such as "
                "config.json. RankNAS does not download models."
            )
        if spec.dtype is not None and spec.dtype not in DTYPES:
            raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}, got {spec.dtype!r}.")
        if spec.gguf_file is not None and not os.path.isfile(spec.folder / spec.gguf_file):
            raise WeightsError(f"there is no file {str(spec.folder / spec.gguf_file)!r}.")
        return spec

    def __str__(self) -> str:
        place = self.folder if self.gguf_file is None else self.folder / self.gguf_file
        return repr(str(place))


def check_config(spec: FolderSpec, known: Collection[str]) -> None:
    """Raise a UsageError unless a folder has the configuration of a model without code of its own.

    Args:
        spec: The folder.
        known: The names of models that ``transformers`` has.
    """
    content = _json(spec.folder / CONFIG, f"the folder {spec} has no {CONFIG}")
    kind = content.get("model_type")
    if COMPRESSED in content:
        raise UsageError(
            f"the folder {spec} holds a network that RankNAS has compressed; load it with "
            "rankNAS.load, and search the folder that it was made from."
        )
    if kind in known:
        if "quantization_config" in content:
            raise UsageError(
                f"the folder {spec} holds quantised weights, which cannot be decomposed; give the "
                "folder of the model before its quantisation."
            )
        return
    if "auto_map" in content:
        raise UsageError(
            f"the folder {spec} needs code of its own, which RankNAS does not run; load the model "
            "yourself and give it to rankNAS.search, or use path/to/file.py:factory."
        )
    raise UsageError(
        f"the folder {spec} has the model type {str(kind)[:100]!r}, which the installed "
        "transformers does not know; install a version that has it."
    )


def check_weights(spec: FolderSpec) -> None:
    """Raise a WeightsError unless all weights files of a folder are there and can be read."""
    present = [name for name in WEIGHTS if os.path.lexists(spec.folder / name)]
    if not present:
        raise WeightsError(
            f"the folder {spec} has no weights; expected model.safetensors, or shards with "
            f"{INDEX}. For a GGUF file, give hf:FOLDER?gguf_file=FILE."
        )
    if present[0] == "model.safetensors":
        _names(spec.folder / present[0])
    elif present[0] == INDEX:
        _check_shards(spec.folder / INDEX)


def _check_shards(index: Path) -> None:
    """Raise a WeightsError unless each tensor of an index is in its shard."""
    content = _json(index, f"there is no {index}")
    parts = content.get("weight_map")
    if not isinstance(parts, dict) or not all(
        isinstance(part, str) and Path(part).name == part for part in parts.values()
    ):
        raise WeightsError(
            f"{index} is no index of weights: expected the file of each tensor under "
            "'weight_map'; fetch it again."
        )
    held = {part: _names(index.with_name(part), index.name) for part in sorted({*parts.values()})}
    for name, part in parts.items():
        if name not in held[part]:
            raise WeightsError(
                f"{index.with_name(part)} lacks {name!r}, which {index.name} says it has; fetch "
                "both again."
            )


def _names(path: Path, index: str | None = None) -> frozenset[str]:
    """The names of the tensors of a safetensors file, from its header."""
    if not os.path.isfile(path):
        named = f", named by {index}," if index else ""
        raise WeightsError(f"the file {str(path)!r}{named} is missing; fetch it.")
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except Exception as error:  # a damaged header can raise any error in the reader
        raise damaged(path, error) from error


def _json(path: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file."""
    if not os.path.isfile(path):
        raise UsageError(f"{missing}; give the folder of a model for transformers.")
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(path)!r} cannot be read: {shortened(str(error), 200)}; fetch it again."
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} holds no JSON object; fetch it again.")
    return content
