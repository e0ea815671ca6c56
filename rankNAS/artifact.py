"""A compressed network as one file: safetensors, with what rebuilds it in the metadata.

Nothing in the file is code: loading builds the dense model by name (or by the caller's factory),
puts empty decomposed layers where the allocation says so, and fills in the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.files import save_atomically
from rankNAS.network import skeleton
from rankNAS.weights import load_state

__all__ = ["load", "read_metadata", "save"]

FORMAT = "1"


def save(
    network: nn.Module,
    allocation: Allocation,
    path: Path | str,
    *,
    model: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write a compressed network; an earlier file stays intact until the new one is complete.

    Args:
        network: The network.
        allocation: The allocation it was made from.
        path: The file.
        model: How to build the dense model: ``space``, ``num_classes`` and ``input_shape``.
            Without it, `load` needs a factory.
        metrics: Kept for the reader.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in network.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "allocation": allocation.to_json(),
        "model": json.dumps(dict(model or {})),
        "metrics": json.dumps(dict(metrics or {})),
        "shared": json.dumps(shared),
    }
    path = Path(path)
    save_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def load(path: Path | str, model_factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network of a file written by `save`, in evaluation mode.

    Args:
        path: The file.
        model_factory: Returns the dense model, weights of any value; not needed for built-in
            spaces.

    Raises:
        WeightsError: Missing or damaged file, or weights that do not fit the model.
        UsageError: The file needs a factory and none is given, or it gives another model.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from rankNAS.network import factorise
        >>> from rankNAS.search_spaces import compile_space
        >>> def model_factory():
        ...     return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> model, x = model_factory(), torch.randn(3, 64)
        >>> space = compile_space(model, x)
        >>> allocation = Allocation.from_json('{"0": "svd:8"}')
        >>> small = factorise(model, space).materialise(allocation)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(small, allocation, folder + "/small.safetensors")
        ...     again = load(file, model_factory)
        >>> bool(torch.equal(again(x), small(x)))
        True
    """
    path = Path(path)
    metadata = read_metadata(path)
    allocation = Allocation.from_json(metadata["allocation"])
    dense = _dense(json.loads(metadata.get("model", "{}")), path, model_factory)
    network = _filled(dense, allocation)
    state = load_file(path)
    for name, kept in json.loads(metadata.get("shared", "{}")).items():
        state[name] = state[kept]
    load_state(network, state, source=str(path))
    return network.eval()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file written by `save`.

    Raises:
        WeightsError: Missing or damaged file, or not one of ours.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {str(path)!r}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(path)!r} is damaged or no safetensors file: {error}") from None
    if "allocation" not in metadata:
        raise WeightsError(f"{str(path)!r} holds weights, but no allocation of RankNAS.")
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{str(path)!r} has format {metadata.get('format')!r}; this version reads {FORMAT!r}."
        )
    return dict(metadata)


def _dense(
    model: Mapping[str, Any], path: Path, model_factory: Callable[[], nn.Module] | None
) -> nn.Module:
    if model_factory is not None:
        return model_factory()
    from rankNAS.plugins import is_plugin
    from rankNAS.search_spaces.zoo import build_model

    if not model or is_plugin(model["space"]):
        raise UsageError(
            f"{str(path)!r} was made from a model of your own; give the function that builds it: "
            "load(path, model_factory)."
        )
    return build_model(
        model["space"],
        num_classes=model["num_classes"],
        input_shape=tuple(model["input_shape"]),
    )


def _filled(dense: nn.Module, allocation: Allocation) -> nn.Module:
    """The skeleton with its decomposed layers on the CPU instead of the meta device."""
    network = skeleton(dense, allocation)
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    return network
