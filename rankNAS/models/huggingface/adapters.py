"""A compressed network as a dense base and adapters for ``peft``.

The product of two factors is what a LoRA adapter adds to a layer. It replaces the layer if the
weight of the base is zero. So the base is the dense model with zeros in place of the decomposed
weights, and each adapter has the rank of its layer and the scale 1. The base is as large as the
dense model: this form is for training the factors with ``peft``, not for saving memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions.shapes import is_hf_conv1d
from rankNAS.exceptions import UsageError
from rankNAS.io.tensors import write_tensors
from rankNAS.models.huggingface.files import (
    MARKER,
    Source,
    new_folder,
    write_object,
    write_shards,
    write_text,
)
from rankNAS.models.huggingface.folder import GENERATION, Dense, network_state
from rankNAS.search_spaces.experts import SeparateExperts
from rankNAS.search_spaces.projections import SplitProjection
from rankNAS.search_spaces.zoo.folders import CONFIG

__all__ = ["BASE", "write_adapters"]

BASE = "base"  # the folder of the base inside that of the adapters
#: By class of ``transformers`` that chooses the model, the task in the configuration of adapters.
TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def write_adapters(
    network: nn.Module, allocation: Allocation, folder: Path, source: Source, card: str
) -> list[str]:
    """Write a network as a folder of adapters for ``peft``, with the folder of its base inside.

    Args:
        network: As for `write_folder`.
        allocation: Its allocation; every decomposed layer has the operator ``svd``.
        folder: As for `write_folder`.
        source: As for `write_folder`.
        card: As for `write_folder`.

    Returns:
        What the folder lacks, in words.

    Raises:
        UsageError: A layer has another operator, or as for `write_folder`.
        RankNASError: As for `write_folder`.
        WriteError: The folder cannot be written.
    """
    dense = Dense.of(network)
    chosen = {name: choice for name, choice in allocation.items() if choice != DENSE}
    _check(dense, chosen)
    state = network_state(network, dense, list(chosen))
    adapters = {}
    for name in chosen:
        for part, stage in (("A", "0"), ("B", "1")):
            key = f"base_model.model.{name}.lora_{part}.weight"
            adapters[key] = state.pop(f"{name}.{stage}.weight")
        own: Any = dense.model.get_submodule(name)
        dtype = adapters[key].dtype
        state[f"{name}.weight"] = torch.zeros(own.weight.shape, dtype=dtype)
        if (bias := state.pop(f"{name}.1.bias", None)) is not None:
            state[f"{name}.bias"] = bias
    with new_folder(folder) as home:
        missing = _write_base(home / BASE, dense, state, source)
        write_tensors(home / "adapter_model.safetensors", adapters, {"format": "pt"})
        base = str(folder.absolute() / BASE)
        write_object(home / "adapter_config.json", _settings(dense, chosen, base))
        write_object(home / MARKER, allocation.labels())
        write_text(home / "README.md", card)
    return missing


def _write_base(
    folder: Path, dense: Dense, state: Mapping[str, Tensor], source: Source
) -> list[str]:
    """Write the base as an ordinary folder for ``transformers``; what it lacks, in words."""
    folder.mkdir()
    write_object(folder / CONFIG, dense.description["config"])
    if (generation := dense.description["generation"]) is not None:
        write_object(folder / GENERATION, generation)
    write_shards(folder, state, source.shard_bytes)
    return source.copy_to(folder)


def _check(dense: Dense, chosen: Mapping[str, Choice]) -> None:
    """Raise a UsageError unless adapters can take the place of all decomposed layers."""
    if not chosen:
        raise UsageError("the network has no decomposed layer, so there is nothing for peft.")
    for name, module in dense.model.named_modules():
        if isinstance(module, SeparateExperts | SplitProjection):
            raise UsageError(
                f"{name!r} is in separate layers, which the model of transformers has in one "
                "module, so adapters find no place there; use --format hf."
            )
    for name, choice in chosen.items():
        if choice.operator != "svd":
            raise UsageError(
                f"layer {name!r} has the choice {str(choice)!r}, but an adapter is a product of "
                "two matrices; search with --operators svd, or use --format hf."
            )
        if len(dense.paths(name)) > 1:
            raise UsageError(
                f"layer {name!r} is at several places of the model, which adapters cannot share; "
                "use --format hf."
            )
        # An adapter's target is also the end of a longer path.
        ending = f".{name}"
        twin = next((n for n, _ in dense.model.named_modules() if n.endswith(ending)), None)
        if twin is not None and twin not in chosen:
            raise UsageError(
                f"peft would take layer {twin!r} for {name!r}, which it is not; use --format hf."
            )


def _settings(dense: Dense, chosen: Mapping[str, Choice], base: str) -> dict[str, Any]:
    """The configuration of the adapters; ``lora_alpha / r`` is 1 for every layer."""
    ranks = {name: choice.rank[0] for name, choice in chosen.items()}
    most = max(ranks.values())
    task = next((TASKS[name] for name in dense.automatic if name in TASKS), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "target_modules": sorted(ranks),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_hf_conv1d(dense.model.get_submodule(n)) for n in chosen),
        "inference_mode": True,
    }
