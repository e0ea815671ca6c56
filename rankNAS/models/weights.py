"""Weights from files, from torchvision, or from a short cached training."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.images.normalise import normalization_from_metadata
from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.io.checkpoints import check_archive
from rankNAS.io.files import cache_folder
from rankNAS.io.tensors import damaged, read_tensors, write_tensors
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import RECIPE_VERSION, train
from rankNAS.search_spaces.zoo import SPACES
from rankNAS.tasks.base import Task

if TYPE_CHECKING:
    from torchvision import models

__all__ = [
    "check_shapes",
    "load_state",
    "load_weights",
    "peek_metadata",
    "pretrained_weights",
    "recorded_normalization",
    "trained_model",
]

logger = logging.getLogger(__name__)

_LISTED = 3  # tensor names listed in a message; the others are counted


def load_weights(model: nn.Module, path: Path | str) -> dict[str, str]:
    """Load a safetensors file or a torch state dict into ``model``, all or nothing.

    A training checkpoint with the weights under ``state_dict`` or ``model`` is accepted, and so
    are names with the common prefix ``module.`` (``nn.DataParallel``). No code of the file runs.

    Returns:
        The metadata of a safetensors file; empty for a torch file.

    Raises:
        WeightsError: The file is missing, damaged or no dict of tensors; its names or shapes
            differ from those of ``model``; or a value is not finite.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it accepts any text
        raise WeightsError(f"there is no weights file {path}; check the path.")
    if path.suffix == ".safetensors":
        state, metadata = read_tensors(path)
    else:
        state, metadata = _read_torch(path), {}
    load_state(model, state, source=str(path))
    return metadata


def peek_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other or invalid file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}


def recorded_normalization(path: Path | str) -> str | None:
    """The input normalisation recorded in a weights file, in the form that `load_data` accepts."""
    texts = peek_metadata(path).values()
    return next(filter(None, map(normalization_from_metadata, texts)), None)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load ``state`` into ``model`` after checking names, shapes and values.

    Args:
        model: The network; it is unchanged if a check fails.
        state: Tensors by name, as in ``model.state_dict()``.
        source: The name of ``state`` in messages, for example the path of a file.

    Raises:
        WeightsError: A name is missing or unexpected, a shape differs or a value is not finite.
    """
    expected = model.state_dict()
    state = _without_prefix(state, expected)
    check_shapes(model, state, source=source)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(
                f"{source} holds a value that is not finite in {name}; the training that wrote it "
                "diverged, so use an earlier checkpoint."
            )
    # Some modules refuse a state without the version of its format, which files may lack.
    versions = getattr(state, "_metadata", None) or getattr(expected, "_metadata", None)
    versioned: OrderedDict[str, Tensor] = OrderedDict(state)
    versioned._metadata = versions  # type: ignore[attr-defined]
    model.load_state_dict(versioned)


def check_shapes(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise a WeightsError unless tensors have the names and shapes of a model's state.

    Args:
        model: The network, perhaps on the ``meta`` device.
        state: Tensors by name.
        source: The name of ``state`` in messages.
    """
    expected = model.state_dict()
    _check_names(state, expected, source)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{source} does not fit the model: {name} has shape {tuple(tensor.shape)}, but "
                f"the model has {tuple(expected[name].shape)}; choose the model and the number "
                "of classes that the weights were made for."
            )


def pretrained_weights(spec: str, num_classes: int) -> dict[str, Tensor]:
    """The default torchvision weights of a network, downloaded once.

    Args:
        spec: A torchvision network of the zoo, or ``torchvision:NAME``.
        num_classes: The number of classes of the model.

    Raises:
        UsageError: No pretrained weights exist for ``spec``, or for this number of classes.
        WeightsError: The download failed.
    """
    weights = _default_weights(spec)
    published = len(weights.meta["categories"])
    if num_classes != published:
        raise UsageError(
            f"the pretrained weights of {spec} are for {published} classes, but the data has "
            f"{num_classes}; use a data set with those classes, or weights from a file."
        )
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: hash mismatch of the download
        raise WeightsError(
            f"the pretrained weights of {spec} could not be downloaded ({error}), which needs "
            "network; download them elsewhere and give the file instead."
        ) from error
    return state


def trained_model(
    spec: str,
    model: nn.Module,
    training_data: Samples,
    *,
    fingerprint: str,
    seed: int,
    config: TrainingConfig,
    task: Task | None = None,
    augmentation: Augmentation = NO_FLIP,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """The trained ``model``, from a new training or from the cache of an identical one.

    The result is cached in ``cache_folder()/models``. An interrupted training resumes from its
    last epoch; a damaged file in the cache is replaced.

    Args:
        spec: The name under which ``model`` was built.
        model: The network, built under ``seed``: its initial weights are not part of the key.
        training_data: The training data.
        fingerprint: Key of the data set and its split.
        seed: Replaces the seed of ``config``.
        config: The training configuration.
        task: Reads batches and outputs; found from a first batch if None.
        augmentation: The augmentation that the data allows.
        device: The device to train on; the model stays there.
        on_step: Called after each step with the step, the number of steps and the loss. It is not
            called if the result is cached.

    Returns:
        The same ``model``, in evaluation mode.
    """
    config = replace(config, seed=seed)
    facts = asdict(config) | {"flip": augmentation.flip}
    key = _cache_key(spec, model, fingerprint, facts)
    path = cache_folder() / "models" / f"{key}.safetensors"
    model.to(device)
    if path.is_file():
        try:
            load_weights(model, path)
            return model.eval()
        except WeightsError as error:
            logger.warning("training %s again, because the cached result is bad: %s", spec, error)
    partial = path.with_suffix(".partial.pt")

    def trained() -> None:
        train(
            model,
            training_data,
            config,
            task=task,
            augmentation=augmentation,
            device=device,
            on_step=on_step,
            checkpoint=partial,
        )

    try:
        trained()
    except WeightsError as error:  # raised before the first step
        logger.warning("training %s from its start, because of a bad checkpoint: %s", spec, error)
        partial.unlink()
        trained()
    metadata = {"spec": spec, "data": fingerprint, "config": json.dumps(facts)}
    state = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    write_tensors(path, state, metadata)
    partial.unlink(missing_ok=True)
    return model


def _cache_key(spec: str, model: nn.Module, fingerprint: str, config: dict[str, Any]) -> str:
    # The printed layers distinguish versions of a network in a user file.
    facts = [spec, str(model), fingerprint, config, RECIPE_VERSION]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused below
            content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) and _is_pickle(path):
            raise WeightsError(
                f"{path} was refused, because loading it could run code: it is not a plain dict "
                "of tensors; save model.state_dict(), best as safetensors."
            ) from error
        raise damaged(path, error) from error
    except Exception as error:  # invalid bytes can raise any error in the reader
        raise damaged(path, error) from error
    return _tensors(content, path)


def _is_pickle(path: Path) -> bool:
    """Whether the file starts like a pickle or a zip archive, unlike text."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The dict of tensors in ``content``, which may be wrapped in a training checkpoint."""
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(name, str) for name in content)
        and all(isinstance(value, Tensor) for value in content.values())
    ):
        return content
    raise WeightsError(
        f"{path} holds no dict of tensors, neither directly nor under 'state_dict' or 'model'; "
        "save model.state_dict(), best as safetensors."
    )


def _without_prefix(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in state)
    if not wrapped or any(name.startswith(prefix) for name in expected):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        raise WeightsError(
            f"{source} belongs to another model: missing {_listing(missing)}; unexpected "
            f"{_listing(unexpected)}; choose the model that the weights were made for."
        )


def _listing(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _default_weights(spec: str) -> models.WeightsEnum:
    from torchvision import models

    name = spec.removeprefix("torchvision:")
    from_zoo = spec in SPACES and SPACES[spec].family == "torchvision"
    known = models.list_models(module=models)
    if name not in known or (name == spec and not from_zoo):
        raise UsageError(
            f"there are no pretrained weights for {spec}; they exist for torchvision's networks "
            "(torchvision:NAME), and other networks take a file of weights."
        )
    return models.get_model_weights(name).DEFAULT
