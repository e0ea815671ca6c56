"""A compressed network as a folder for ``transformers``, written and loaded.

`load_folder` builds the network from the configuration and never runs the module in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation
from rankNAS.decompositions import OPERATORS
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError, UsageError, WeightsError
from rankNAS.io.files import read_json
from rankNAS.models.huggingface.code import MODULE, module_text, stage_arguments
from rankNAS.models.huggingface.description import configured, described
from rankNAS.models.huggingface.files import (
    Source,
    new_folder,
    write_object,
    write_shards,
    write_text,
)
from rankNAS.models.huggingface.rebuilding import rebuilt
from rankNAS.models.weight_files import read_weights
from rankNAS.search_spaces.experts import SeparateExperts
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.projections import SplitProjection
from rankNAS.search_spaces.zoo.folders import COMPRESSED, CONFIG
from rankNAS.search_spaces.zoo.huggingface import empty_model

__all__ = ["GENERATION", "Dense", "load_folder", "network_state", "write_folder"]

FORMAT = 1
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Dense:
    """The dense model of a network of ``transformers``, without weights.

    Args:
        description: The description of the network.
        config: Its configuration.
        kind: Its class.
        model: The model on the meta device.
    """

    description: dict[str, Any]
    config: Any
    kind: Any
    model: nn.Module

    @classmethod
    def of(cls, network: nn.Module) -> Dense:
        """The dense model of a network.

        Raises:
            UsageError: The network is not a model of ``transformers``.
        """
        description = described(network)
        if description is None:
            raise UsageError(
                f"a {type(network).__name__} is no model of transformers, so it cannot be written "
                "as a folder for it; use --format safetensors."
            )
        config, kind = configured(description, type(network).__name__)
        plain = with_plain_layers(empty_model(config, kind), network.state_dict())
        return cls(description, config, kind, plain)

    @property
    def automatic(self) -> list[str]:
        """The classes of ``transformers`` that choose this class from the configuration."""
        from transformers.models.auto import modeling_auto

        found = []
        for name in sorted(vars(modeling_auto)):
            mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
            if name.startswith("AutoModel") and mapping is not None:
                classes = mapping[type(self.config)] if type(self.config) in mapping else ()
                if self.kind in (classes if isinstance(classes, tuple) else (classes,)):
                    found.append(name)
        return [name for name in found if name != "AutoModelForPreTraining"] or found

    def paths(self, layer: str) -> list[str]:
        """All paths of a layer."""
        module: Any = self.model.get_submodule(layer)
        return [
            path
            for path, other in self.model.named_modules(remove_duplicate=False)
            if other is module or getattr(other, "weight", None) is module.weight
        ]

    def stages(self, layer: str, allocation: Allocation) -> tuple[LayerShape, ...]:
        """The chain that replaces a layer."""
        choice, module = allocation[layer], self.model.get_submodule(layer)
        return OPERATORS[choice.operator].stages(LayerShape.of(module), choice.rank)


def write_folder(
    network: nn.Module, allocation: Allocation, folder: Path, source: Source, card: str
) -> list[str]:
    """Write a network as a folder that ``from_pretrained(..., trust_remote_code=True)`` loads.

    Args:
        network: The network, from `rankNAS.load`.
        allocation: Its allocation.
        folder: The folder; an earlier export there is replaced when the new one is complete.
        source: The files of the dense model's folder, and the size of a shard.
        card: The text of the model card.

    Returns:
        What the folder lacks, in words.

    Raises:
        UsageError: The network is not a model of ``transformers``, or the folder has other files.
        RankNASError: The network has layers that its class and the allocation do not explain.
        WriteError: The folder cannot be written.
    """
    dense = Dense.of(network)
    layers: list[dict[str, Any]] = [
        {
            "paths": dense.paths(name),
            "stages": [stage_arguments(stage) for stage in dense.stages(name, allocation)],
        }
        for name, choice in allocation.items()
        if choice != DENSE
    ]
    state = network_state(network, dense, [path for layer in layers for path in layer["paths"]])
    config = _configuration(dense, allocation, layers)
    with new_folder(folder) as place:
        write_object(place / CONFIG, config)
        if (generation := dense.description["generation"]) is not None:
            write_object(place / GENERATION, generation)
        code = module_text(type(dense.config).__name__, dense.kind.__name__, config["model_type"])
        write_text(place / f"{MODULE}.py", code)
        write_text(place / "README.md", card)
        missing = source.copy_to(place)
        write_shards(place, state, source.shard_bytes)
    return missing


def load_folder(folder: Path) -> nn.Module:
    """The network of a folder from `write_folder`, in evaluation mode; no code of it runs.

    Raises:
        UsageError: The folder is not from `write_folder`.
        WeightsError: A file of it is damaged or missing.
    """
    content = _read(folder / CONFIG)
    own = content.pop(COMPRESSED, None)
    if not isinstance(own, dict):
        raise UsageError(
            f"the folder {str(folder)!r} holds no network of RankNAS (config.json has no "
            f"{COMPRESSED!r}); load it with transformers, or search it as hf:{folder}."
        )
    labels = own.get("allocation")
    if own.get("format") != FORMAT or not isinstance(labels, dict):
        raise WeightsError(
            f"the folder {str(folder)!r} has a format that this version of RankNAS does not read."
        )
    generation = folder / GENERATION
    description = {
        "class": own.get("class"),
        "config": content | {"model_type": own.get("model_type")},
        "generation": _read(generation) if generation.is_file() else None,
        "buffers": own.get("buffers"),
    }
    state, _ = read_weights(folder)
    return rebuilt(description, Allocation.from_json(json.dumps(labels)), state, str(folder))


def _configuration(
    dense: Dense, allocation: Allocation, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """The configuration of a written folder.

    Its kind of model is one that ``transformers`` does not have: the class of the dense model
    would load it with random weights in place of the decomposed ones, and only warn.
    """
    own, name = dense.description["config"], dense.kind.__name__
    modules = list(dense.model.named_modules())
    classes = dict.fromkeys(dense.automatic, f"{MODULE}.RankNAS{name}")
    found: dict[str, Any] = own | {
        "model_type": f"ranknas_{own['model_type']}",
        "architectures": [f"RankNAS{name}"],
        "auto_map": {"AutoConfig": f"{MODULE}.RankNASConfig"} | classes,
        COMPRESSED: {
            "format": FORMAT,
            "class": name,
            "model_type": own["model_type"],
            "buffers": dense.description["buffers"],
            "allocation": allocation.labels(),
            "experts": [p for p, m in modules if isinstance(m, SeparateExperts)],
            "projections": {p: m.sizes for p, m in modules if isinstance(m, SplitProjection)},
            "layers": layers,
        },
    }
    return found


def network_state(network: nn.Module, dense: Dense, paths: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a network by name, each weight that is tied in the dense model once.

    Args:
        network: The network.
        dense: Its dense model.
        paths: All paths of decomposed layers.

    Raises:
        RankNASError: Another layer of the network has other names than in the dense model.
    """
    replaced = tuple(f"{path}." for path in paths)
    own = {name: x.detach() for name, x in network.state_dict().items()}
    rest = {n: x for n, x in own.items() if not n.startswith(replaced)}
    tied: dict[int, str] = {}
    wanted: dict[str, str] = {}  # by name in the dense model, the first name of its parameter
    for name, tensor in dense.model.state_dict(keep_vars=True).items():
        if not name.startswith(replaced):
            wanted[name] = tied.setdefault(id(tensor), name)
    if rest.keys() != wanted.keys():
        odd = sorted(rest.keys() ^ wanted.keys())[0]
        raise RankNASError(
            f"the network has other tensors than {dense.kind.__name__} with these layers ({odd!r}"
            "), so it cannot be written for transformers; use --format safetensors."
        )
    return {
        name: tensor
        for name, tensor in own.items()
        if wanted.get(name, name) == name or tensor.data_ptr() != own[wanted[name]].data_ptr()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{str(path)!r} cannot be read ({error}); fetch it again.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{str(path)!r} holds no JSON object; fetch it again.")
    return content
