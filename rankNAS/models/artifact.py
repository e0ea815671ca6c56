"""A compressed network as one safetensors file, with metadata to rebuild it.

The file contains no code. Loading builds the dense model by name, from the configuration of a
model of ``transformers`` or by the caller's factory, inserts empty decomposed layers according to
the allocation, and fills in the weights. The file also holds a few outputs on fixed inputs,
so that another function of the same weights is noticed. Every entry is held against bounds before
anything is allocated for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import skeleton
from rankNAS.exceptions import StudyError, UsageError, WeightsError
from rankNAS.io.formats import FORMAT, current_format, upgraded
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.models.bounds import check_choices, check_sizes
from rankNAS.models.huggingface.description import described
from rankNAS.models.huggingface.folder import load_folder
from rankNAS.models.huggingface.rebuilding import rebuilt
from rankNAS.models.inputs import InputSpec
from rankNAS.models.sketches import CHECK, compare, sketched
from rankNAS.models.weights import check_shapes, load_state
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.zoo.huggingface import is_huggingface

__all__ = ["is_configured", "load", "read_inputs", "read_metadata", "save"]

TRANSFORMERS = "transformers"  # the entry of a description that `described` makes


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
        model: Description of the dense model: ``space``, with ``num_classes`` and
            ``input_shape`` (None if it has none), without which `load` needs a factory; and
            ``inputs``, the form of its arguments (`InputSpec.to_json`), for exports. With either,
            the file also holds outputs, which `load` compares. A model of ``transformers`` is
            described by its configuration and needs no factory.
        metrics: Measured metrics, stored for the reader.

    Raises:
        WriteError: The file cannot be written, for example on a full disk.
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
    recipe = dict(model or {})
    if (configuration := described(network)) is not None:
        recipe[TRANSFORMERS] = configuration
    check = sketched(network, _spec(recipe))
    metadata = {
        FORMAT: str(current_format("network")),
        "allocation": allocation.to_json(),
        "model": json.dumps(recipe),
        "metrics": json.dumps(dict(metrics or {})),
        "shared": json.dumps(shared),
    }
    if check is not None:
        metadata[CHECK] = json.dumps(check)
    path = Path(path)
    write_tensors(path, tensors, metadata)
    return path


def load(path: Path | str, model_factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network of a file written by `save`, in evaluation mode.

    Args:
        path: The file; or a folder written by ``ranknas export --format hf``, whose code does not
            run.
        model_factory: Returns the dense model with any weights; not needed for built-in
            spaces and models of ``transformers``.

    Raises:
        WeightsError: The file is missing or damaged, its weights do not fit the model, or the
            network computes something else than the one that was saved.
        UsageError: The file needs a factory and none is given, or it returns no model or
            another one.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from rankNAS.compression.factorisation import factorise
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
    if model_factory is None and os.path.isdir(path):
        return load_folder(path)
    metadata = read_metadata(path)
    state, _ = read_tensors(path)
    allocation, model, shared = _described(path, metadata, state)
    state |= {name: state[kept] for name, kept in shared.items()}
    if model_factory is None and TRANSFORMERS in model:
        network = rebuilt(model[TRANSFORMERS], allocation, state, str(path))
    else:
        network = _rebuilt(model, allocation, state, path, model_factory)
    if CHECK in metadata:
        compare(network, metadata[CHECK], _spec(model), str(path))
    return network


def _rebuilt(
    model: Mapping[str, Any],
    allocation: Allocation,
    state: Mapping[str, Tensor],
    path: Path,
    model_factory: Callable[[], nn.Module] | None,
) -> nn.Module:
    """The network of a built-in space, or of the caller's factory."""
    if model_factory is None:
        check_sizes(model, state, str(path))
    names = {*allocation, *state}
    dense = with_plain_layers(_dense(model, path, model_factory), names)
    check_choices(dense, allocation, str(path))
    network = _filled(skeleton(dense, allocation), state, path)
    load_state(network, state, source=str(path))
    return network.eval()


def is_configured(path: Path | str) -> bool:
    """Whether a file has the configuration of a model of ``transformers``, which needs no factory.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    try:
        model = json.loads(read_metadata(Path(path)).get("model", "{}"))
    except (ValueError, RecursionError):
        return False  # `load` says what is wrong
    return isinstance(model, dict) and TRANSFORMERS in model


def read_inputs(path: Path | str) -> InputSpec | None:
    """The form of the arguments of a network in a file written by `save`; None if unknown.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    metadata = read_metadata(Path(path))
    try:
        model = json.loads(metadata.get("model", "{}"))
        if model.get("inputs"):
            return InputSpec.from_json(model["inputs"])
        shape = model.get("input_shape")
        return _of_shape(shape) if shape else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"the metadata of {str(path)!r} is damaged: {error}") from None


def _spec(model: Mapping[str, Any]) -> InputSpec | None:
    """The form of the arguments that a description of a model has; None if unknown or damaged."""
    try:
        if model.get("inputs"):
            return InputSpec.from_json(model["inputs"])
        shape = model.get("input_shape")
        return _of_shape(shape) if shape else None
    except (ValueError, TypeError, RecursionError):
        return None


def _of_shape(shape: Any) -> InputSpec:
    """The form of one tensor; checked before it is allocated."""
    node = {"shape": list(shape), "dtype": "float32", "batched": True}
    return InputSpec.from_json({"args": [{"tensor": node}], "kwargs": {}})


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file written by `save`.

    Raises:
        WeightsError: The file is missing or damaged, or was not written by `save`.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, it accepts any text
        raise WeightsError(f"there is no file {str(path)!r}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{str(path)!r} is damaged or no safetensors file: {error}") from None
    if "allocation" not in metadata:
        raise WeightsError(f"{str(path)!r} holds weights, but no allocation of RankNAS.")
    return _upgraded(metadata, path)


def _upgraded(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """The metadata in the current format; only the measured metrics have changed so far."""
    try:
        metrics = json.loads(metadata.get("metrics", "{}"))
        content = upgraded("network", {**metadata, "metrics": metrics}, repr(str(path)))
        return {**content, "metrics": json.dumps(content["metrics"]), FORMAT: str(content[FORMAT])}
    except StudyError as error:
        raise WeightsError(str(error)) from None
    except (ValueError, RecursionError, AttributeError) as error:
        raise WeightsError(f"the metadata of {str(path)!r} is damaged: {error}") from None


def _described(
    path: Path, metadata: Mapping[str, str], state: Mapping[str, Tensor]
) -> tuple[Allocation, dict[str, Any], dict[str, str]]:
    """The allocation, the description of the dense model and shared tensor names, all checked."""
    try:
        allocation = Allocation.from_json(metadata["allocation"])
        model, shared = (json.loads(metadata.get(key, "{}")) for key in ("model", "shared"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"the metadata of {str(path)!r} is damaged: {error}") from None
    if not isinstance(shared, dict) or not all(
        isinstance(kept, str) and kept in state for kept in shared.values()
    ):
        raise WeightsError(f"the metadata of {str(path)!r} shares tensors that it does not have.")
    if not isinstance(model, dict) or ("space" in model and not _is_recipe(model)):
        raise WeightsError(
            f"the metadata of {str(path)!r} does not say how its model is built: expected "
            f"`space`, `num_classes` and `input_shape`, got {model!r}."
        )
    return allocation, model, shared


def _is_recipe(model: Mapping[str, Any]) -> bool:
    """Whether a description of a model is complete; a user's factory may need neither number."""
    space, classes, shape = (model.get(k) for k in ("space", "num_classes", "input_shape"))
    if not isinstance(space, str):
        return False
    if is_plugin(space) or is_huggingface(space):
        classes, shape = 0 if classes is None else classes, [] if shape is None else shape
    return (
        isinstance(classes, int)
        and not isinstance(classes, bool)
        and isinstance(shape, list)
        and all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    )


def _dense(
    model: Mapping[str, Any], path: Path, model_factory: Callable[[], nn.Module] | None
) -> nn.Module:
    if model_factory is not None:
        is_function = callable(model_factory) and not isinstance(model_factory, nn.Module)
        dense: Any = model_factory() if is_function else model_factory
        if not is_function or not isinstance(dense, nn.Module):
            given = "returned" if is_function else "is"
            raise UsageError(
                f"`model_factory` {given} a {type(dense).__name__}; give a function that returns "
                "the dense model, an nn.Module: load(path, lambda: model)."
            )
        return dense
    from rankNAS.search_spaces.zoo import build_model

    if "space" not in model or is_plugin(model["space"]) or is_huggingface(model["space"]):
        raise UsageError(
            f"{str(path)!r} was made from a model of your own; give the function that builds it: "
            "load(path, model_factory)."
        )
    return build_model(
        model["space"],
        num_classes=model["num_classes"],
        input_shape=None if model["input_shape"] is None else tuple(model["input_shape"]),
    )


def _filled(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A skeleton with decomposed layers on the CPU instead of the meta device."""
    check_shapes(network, state, source=str(path))  # before anything is allocated
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    return network
