"""The data of a model: language data take the tokenizer and the context of the model's folder.

For a masked language model a share of their tokens is hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankNAS.data.base import Data
from rankNAS.data.loading import DataSource, load_data
from rankNAS.data.text.loading import CONTEXT, is_text
from rankNAS.data.text.masking import SHARE
from rankNAS.exceptions import DataError
from rankNAS.lazy import load
from rankNAS.tasks.text import POSITIONS, config_number

__all__ = ["FOLDER", "context_of", "load_data_of"]

#: Imported when a network is a folder.
CONTEXT_LENGTH = "rankNAS.search_spaces.zoo.huggingface:context_length"
IS_MASKED = "rankNAS.search_spaces.zoo.huggingface:is_masked"
FOLDER = "hf:"  # the form of a network that is a Hugging Face folder


def load_data_of(
    model: nn.Module | str,
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
    most = context_of(model)
    if most is not None and context is not None and context > most:
        raise DataError(
            f"the context of {context} tokens is longer than that of the model, {most}; give "
            f"--context {most} or less."
        )
    if context is None and most is not None and not str(source).startswith("tokens:"):
        context = min(CONTEXT, most)
    return load_data(
        source,
        tokenizer=_tokenizer(model),
        context=context,
        stride=stride,
        mask=SHARE if _is_masked(model) else None,
        **options,
    )


def context_of(model: str | nn.Module) -> int | None:
    """The number of tokens that a model takes; None if it does not say so."""
    folder = _folder(model)
    if folder is not None:
        found: int | None = load(CONTEXT_LENGTH)(folder)
        return found
    return config_number(getattr(model, "config", None), *POSITIONS)


def _is_masked(model: str | nn.Module) -> bool:
    folder = _folder(model)
    if folder is not None:
        found: bool = load(IS_MASKED)(folder)
        return found
    return "MaskedLM" in type(model).__name__


def _folder(model: str | nn.Module) -> str | None:
    """What follows ``hf:``, a folder perhaps with options; None for other models."""
    if not isinstance(model, str) or not model.startswith(FOLDER):
        return None
    return model.removeprefix(FOLDER)


def _tokenizer(model: str | nn.Module) -> str | None:
    """The folder of the tokenizer, without options that only concern weights."""
    folder = _folder(model)
    if folder is None:
        return None
    path, _, query = folder.partition("?")
    kept = [entry for entry in query.split("&") if entry.startswith("gguf_file=")]
    return "?".join([path, *kept])
