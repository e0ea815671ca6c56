"""The data of a model: language data take the tokenizer and the context of the model's folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankNAS.data.base import Data
from rankNAS.data.loading import DataSource, load_data
from rankNAS.data.text.loading import CONTEXT, is_text
from rankNAS.exceptions import DataError, UsageError
from rankNAS.lazy import load
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.zoo import build_model
from rankNAS.tasks.text import POSITIONS, config_number

__all__ = ["FOLDER", "context_of", "load_data_of", "trained_by_name"]

#: Imported when a network is a folder.
CONTEXT_LENGTH = "rankNAS.search_spaces.zoo.huggingface:context_length"
FOLDER = "hf:"  # the form of a network that is a Hugging Face folder


def load_data_of(
    model: str | nn.Module,
    source: DataSource,
    *,
    context: int | None = None,
    stride: int | None = None,
    **options: Any,
) -> Data:
    """The data for a model; see `load_data`.

    Args:
        model: The model, or its name. The tokenizer of ``hf:FOLDER`` is used unless the source
            names one.
        source: The data.
        context: Tokens of a window of language data; by default 1,024, or as many as the model
            takes if that is less.
        stride: As for `load_data`.
        options: The other options of `load_data`.

    Raises:
        DataError: The data are invalid, or the context is longer than the model's.
        UsageError: The folder has no tokenizer.
    """
    if not is_text(source):
        return load_data(source, context=context, stride=stride, **options)
    folder = _folder(model)
    most = context_of(model)
    if most is not None and context is not None and context > most:
        raise DataError(
            f"the context of {context} tokens is longer than that of the model, {most}; give "
            f"--context {most} or less."
        )
    if context is None and most is not None and not str(source).startswith("tokens:"):
        context = min(CONTEXT, most)
    return load_data(source, tokenizer=folder, context=context, stride=stride, **options)


def trained_by_name(name: str, data: Data) -> nn.Module:
    """The trained network that a name states, in evaluation mode.

    Raises:
        UsageError: The name is that of a network without weights, or of none.
    """
    if not name.startswith(FOLDER) and not is_plugin(name):
        raise UsageError(
            f"{name!r} is no trained network; give a model, hf:FOLDER or path/to/file.py:factory."
        )
    return build_model(name, num_classes=data.num_classes, input_shape=data.input_shape).eval()


def context_of(model: str | nn.Module) -> int | None:
    """The number of tokens that a model takes; None if it does not say so."""
    folder = _folder(model)
    if folder is not None:
        found: int | None = load(CONTEXT_LENGTH)(folder)
        return found
    return config_number(getattr(model, "config", None), *POSITIONS)


def _folder(model: str | nn.Module) -> str | None:
    """The folder of ``hf:FOLDER``, perhaps with ``?gguf_file=FILE``; None for other models."""
    named = isinstance(model, str) and model.startswith(FOLDER)
    return str(model).removeprefix(FOLDER) if named else None
