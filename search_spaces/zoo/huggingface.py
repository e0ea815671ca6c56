"""Networks of Hugging Face folders, ``hf:FOLDER``. No code of a folder runs, nothing is fetched.

`transformers` maps the tensors of safetensors files into memory if the wanted data type is that of
the file. Such weights cost no memory until they are read, and the system can drop them again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankNAS.exceptions import UsageError, WeightsError, shortened
from rankNAS.search_spaces.zoo.folders import FolderSpec, check_config, check_weights

__all__ = [
    "PREFIX",
    "context_length",
    "empty_model",
    "example_inputs",
    "huggingface_model",
    "is_huggingface",
    "library",
    "model_class",
    "named_model",
    "quiet",
    "read_config",
]

PREFIX = "hf:"
WINDOW = 1024  # tokens of an example without data
#: Where configurations keep the largest number of positions.
POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length"),
)
#: Models whose positions start behind the number of the padding token.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"}


def is_huggingface(spec: str) -> bool:
    """Whether the name of a space has the form ``hf:FOLDER``."""
    return spec.startswith(PREFIX)


def huggingface_model(folder_spec: str) -> nn.Module:
    """The model of a folder with its weights, in evaluation mode.

    Args:
        folder_spec: The folder, perhaps with ``?gguf_file=FILE`` or ``?dtype=TYPE``; the data type
            is that of the folder by default. The class is the first of ``architectures`` in
            ``config.json``.

    Raises:
        UsageError: There is no such folder, its model needs code of its own, or ``transformers``
            is missing or does not know the model.
        WeightsError: Weights are missing, damaged or of other shapes.
    """
    spec = FolderSpec.parse(folder_spec)
    config = read_config(folder_spec)
    kind = model_class(config, spec)
    if spec.gguf_file is None:
        check_weights(spec)
    try:
        with quiet():
            model, found = kind.from_pretrained(
                str(spec.folder),
                config=config,
                dtype=spec.dtype or "auto",
                gguf_file=spec.gguf_file,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except Exception as error:  # of any kind, by the file and the model
        raise WeightsError(
            f"transformers cannot load the weights of {spec}: {type(error).__name__}: "
            f"{shortened(str(error), 300)}"
        ) from error
    _check_complete(found, spec)
    network: nn.Module = model.eval()
    return network


def named_model(model: nn.Module | str) -> nn.Module:
    """The model itself, or that of ``hf:FOLDER``.

    Raises:
        UsageError: A text of another form, or as for `huggingface_model`.
    """
    if not isinstance(model, str):
        return model
    if not is_huggingface(model):
        raise UsageError(
            f"the model is {shortened(repr(model), 100)}; give an nn.Module, or hf:FOLDER for the "
            "model of a folder."
        )
    return huggingface_model(model.removeprefix(PREFIX))


def context_length(folder_spec: str) -> int | None:
    """The largest number of tokens that the model of a folder takes; None if it has no limit.

    Raises:
        UsageError: As for `huggingface_model`.
    """
    return _context(read_config(folder_spec))


def is_masked(folder_spec: str) -> bool:
    """Whether the model of a folder predicts masked tokens.

    Raises:
        UsageError: As for `huggingface_model`.
    """
    names = getattr(read_config(folder_spec), "architectures", None) or [""]
    return "MaskedLM" in str(names[0])


def read_config(folder_spec: str) -> Any:
    """The configuration of a folder, an object of ``transformers``.

    Raises:
        UsageError: As for `huggingface_model`.
    """
    spec = FolderSpec.parse(folder_spec)
    transformers = library(f"{PREFIX}{folder_spec}")
    if spec.gguf_file is None:
        check_config(spec, transformers.CONFIG_MAPPING.keys())
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                str(spec.folder),
                gguf_file=spec.gguf_file,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # of any kind, by the file
        raise UsageError(
            f"transformers cannot read the configuration of {spec}: {type(error).__name__}: "
            f"{shortened(str(error), 300)}"
        ) from error


def model_class(config: Any, source: object) -> Any:
    """The class of ``transformers`` that a configuration names.

    Args:
        config: The configuration.
        source: The name of its folder or file in messages.

    Raises:
        UsageError: It names none, or one that ``transformers`` does not have.
    """
    transformers = library(str(source))
    names = list(getattr(config, "architectures", None) or ())
    if not names:
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if getattr(source, "gguf_file", None) and type(config) in known:
            return known[type(config)]
        raise UsageError(
            f"the configuration of {source} names no class under 'architectures'; add the one of "
            'its weights, such as ["LlamaForCausalLM"].'
        )
    kind = getattr(transformers, str(names[0]), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UsageError(
            f"{source} needs the class {str(names[0])[:100]!r}, which transformers "
            f"{transformers.__version__} does not have; install a version that has it."
        )
    return kind


def empty_model(config: Any, kind: Any) -> nn.Module:
    """A model of a configuration on the meta device, in evaluation mode.

    Args:
        config: The configuration.
        kind: Its class, from `model_class`.
    """
    with quiet(), torch.device("meta"):
        model: Any = kind._from_config(copy.deepcopy(config))
    # Some models look for it in the last tokens, and the meta device has no values.
    model.config.pad_token_id = None
    network: nn.Module = model.eval()
    return network


def example_inputs(model: Any, image_size: int | None = None) -> dict[str, Any]:
    """Arguments of one sample for a model of ``transformers``, from its configuration.

    A text has 1,024 tokens, or as many as the model takes.

    Args:
        model: The model; the tensors are on its device.
        image_size: The side of an image in pixels, instead of that of the configuration.

    Raises:
        UsageError: The model takes neither tokens nor images.
    """
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = image_size or getattr(config, "image_size", 224)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return {name: torch.zeros(shape, device=model.device, dtype=model.dtype)}
    if name != "input_ids":
        raise UsageError(
            f"{type(model).__name__} takes {name!r}, for which there is no example without data; "
            "compile it in Python: rankNAS.compile_space(model, inputs)."
        )
    length = min(WINDOW, _context(config) or WINDOW)
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    found: dict[str, Any] = {name: tokens}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = tokens.clone()
    if tokens.is_meta and getattr(config, "use_cache", False):
        found["use_cache"] = True  # without a cache, the values of positions are compared
    return found


def library(needed_by: str) -> Any:
    """The package ``transformers``.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"`{needed_by}` needs transformers: pip install 'ranknas[hf]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which ``transformers`` shows no progress and reports errors only."""
    from transformers.utils import logging as module

    logging: Any = module
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _context(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in POSITIONS)
    length = next((n for n in found if isinstance(n, int) and n > 0), None)
    if length is None or getattr(text, "model_type", "") == "t5":  # relative positions
        return None
    if text.model_type in OFFSET_POSITIONS:
        length -= (text.pad_token_id or 0) + 1
    return length


def _check_complete(found: dict[str, Any], spec: FolderSpec) -> None:
    """Raise a WeightsError unless every tensor of a model was in its files, in the right shape."""
    wrong = sorted(found["mismatched_keys"], key=str)
    if wrong:
        name, own, wanted = wrong[0]
        raise WeightsError(
            f"the weights of {spec} do not fit its config.json: {name} has shape {tuple(own)}, "
            f"but the model has {tuple(wanted)}{_others(wrong)}; fetch the folder again."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise WeightsError(
            f"the weights of {spec} lack {missing[0]!r}{_others(missing)}; fetch the folder "
            "again, or name the class of its weights under 'architectures' in config.json."
        )


def _others(found: list[Any]) -> str:
    return f" ({len(found) - 1} more)" if len(found) > 1 else ""
