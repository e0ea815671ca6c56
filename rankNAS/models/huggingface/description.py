"""The description of a model of ``transformers`` in a file, and its checks.

A description has the configuration, the name of the class and the generation configuration. It is
enough to build the model without the folder that it came from. Descriptions of files are forged
easily, so their sizes are bounded before anything is built.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from rankNAS.exceptions import WeightsError, shortened
from rankNAS.search_spaces.zoo.huggingface import library, model_class

__all__ = ["configured", "described", "is_transformers", "text_of"]

#: Entries of a configuration that choose code or packages, not the function of the model.
LEFT_OUT = {
    *("auto_map", "attn_implementation", "experts_implementation", "fusion_config"),
    *("kernel_config", "quantization_config", "distributed_config", "use_pretrained_backbone"),
}
#: Numbers of repeated parts have one of these words in their names.
REPEATED = ("layer", "depth", "block", "stage", "expert", "head", "group", "codebook")
MOST_PARTS = 1 << 20
LARGEST = 1 << 33
MOST_TEXT = 1 << 24  # characters of a configuration


def is_transformers(network: object) -> bool:
    """Whether a network is a model of a class that ``transformers`` itself defines."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not type(network).__module__.startswith("transformers."):
        return False
    return isinstance(network, transformers.PreTrainedModel)


def described(network: nn.Module) -> dict[str, Any] | None:
    """The description of a model as JSON values; None if `is_transformers` is false.

    Args:
        network: The model, dense or compressed.
    """
    if not is_transformers(network):
        return None
    own: Any = network
    generation = own.generation_config if own.can_generate() else None
    name, config = type(network).__name__, json.loads(text_of(own.config))
    dtype = config.get("dtype") or str(own.dtype).removeprefix("torch.")
    return {
        "class": name,
        "config": config | {"architectures": [name], "dtype": dtype},
        "generation": None if generation is None else json.loads(text_of(generation)),
        "buffers": dict(_buffer_types(network)),
    }


def text_of(config: Any) -> str:
    """A configuration of ``transformers`` as JSON text: what differs from the defaults."""
    text: str = config.to_json_string()
    return text


def configured(description: Any, source: str) -> tuple[Any, Any]:
    """The configuration and the class of a description, checked.

    Args:
        description: From a file; perhaps forged.
        source: The name of the file in messages.

    Raises:
        UsageError: ``transformers`` is not installed or does not have the model.
        WeightsError: The description is damaged.
    """
    transformers = library(source)
    try:
        content = _bounded(description["config"])
        name, kind = description["class"], content["model_type"]
        if not isinstance(name, str) or not isinstance(kind, str):
            raise ValueError("the names of the class and of the model must be texts")
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(f"transformers {transformers.__version__} has no model {kind!r:.80}")
        config = transformers.CONFIG_MAPPING[kind].from_dict(content)
        config.architectures = [name]
    except Exception as error:  # a forged value can raise any error in a configuration
        raise WeightsError(
            f"the description of the model in {source!r} is damaged: {type(error).__name__}: "
            f"{shortened(str(error), 300)}"
        ) from None
    found = model_class(config, source)
    if not found.__module__.startswith("transformers.") or found.config_class is not type(config):
        raise WeightsError(
            f"the description of the model in {source!r} is damaged: the class {name[:80]!r} does "
            f"not belong to the model {kind[:80]!r}."
        )
    return config, found


def _bounded(content: Any) -> dict[str, Any]:
    """A configuration without entries that choose code; raises a ValueError if it is too large."""
    if not isinstance(content, dict) or len(json.dumps(content)) > MOST_TEXT:
        raise ValueError("the configuration is no JSON object, or too long")
    for name, value in _numbers(content, ""):
        repeated = any(word in name.lower() for word in REPEATED)
        if abs(value) > (MOST_PARTS if repeated else LARGEST):
            raise ValueError(f"{name} is {value}")
    return _cleaned(content)


def _cleaned(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _cleaned(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if not name.startswith("_") and name not in LEFT_OUT
    }


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration by their names."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, int):
        yield name, value


def _buffer_types(network: nn.Module) -> Iterator[tuple[str, str]]:
    """The data types of buffers that no file holds, such as the frequencies of positions."""
    for path, module in network.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}".lstrip("."), str(buffer.dtype).removeprefix("torch.")
