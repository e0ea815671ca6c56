"""Export of a network as a folder for ``transformers`` or ``peft``; it is loaded and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.exceptions import RankNASError
from rankNAS.models.export import compared
from rankNAS.models.huggingface.adapters import write_adapters
from rankNAS.models.huggingface.card import card_text
from rankNAS.models.huggingface.files import Source
from rankNAS.models.huggingface.folder import Dense, load_folder, write_folder
from rankNAS.models.inputs import InputSpec
from rankNAS.trees import tensors

__all__ = ["FOLDERS", "export_folder"]

FOLDERS: dict[str, Callable[..., list[str]]] = {"hf": write_folder, "peft": write_adapters}


def export_folder(
    network: nn.Module,
    allocation: Allocation,
    folder: Path,
    format: str,
    *,
    inputs: InputSpec | None,
    source: Source,
    dense: Mapping[str, Any],
    measured: Mapping[str, Any],
    command: str,
    dtype: str | None = None,
) -> tuple[float | None, list[str]]:
    """Write a network as a folder.

    Args:
        network: The network, from `rankNAS.load`.
        allocation: Its allocation.
        folder: The folder; an earlier export there is replaced.
        format: ``hf``, for ``transformers``; or ``peft``, a base and adapters.
        inputs: The form of its arguments; None if unknown.
        source: The files of the dense model's folder, and the size of a shard.
        dense: Numbers of the dense model, for the model card.
        measured: The same of the network.
        command: The command that made the network.
        dtype: The data type that its weights were converted to, for the model card.

    Returns:
        The largest absolute difference between the outputs of the loaded folder and of the
        network, None where it is not loaded; and what the folder lacks, in words.

    Raises:
        RankNASError: The loaded network computes something else.
        UsageError: The network cannot be written in this form.
        WriteError: The folder cannot be written.
    """
    model = Dense.of(network)
    auto = (model.automatic or ["AutoModel"])[0]
    name = model.kind.__name__
    card = card_text(format, name, auto, allocation, dense, measured, command, dtype)
    missing = FOLDERS[format](network, allocation, folder, source, card)
    if format != "hf" or inputs is None:
        return None, missing
    return _difference(network, folder, inputs), missing


def _difference(network: nn.Module, folder: Path, inputs: InputSpec) -> float:
    """The largest difference of the outputs of a written folder on random arguments."""
    given = inputs.random(2)
    with torch.no_grad():
        expected = tensors(given.copied().run(network.eval()))
        found = tensors(given.copied().run(load_folder(folder)))
    if not expected:
        raise RankNASError(f"the network in {str(folder)!r} has no tensors in its output.")
    return compared(found, expected, folder)
