"""Weights from files, from torchvision, or from a short cached training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.images.normalise import normalization_from_metadata
from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.io.files import cache_folder
from rankNAS.io.tensors import write_tensors
from rankNAS.models.state_dicts import fitting_state
from rankNAS.models.weight_files import read_weights
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import RECIPE_VERSION, train
from rankNAS.search_spaces.zoo import SPACES
from rankNAS.search_spaces.zoo.resnet9 import whiten
from rankNAS.tasks.base import Task

if TYPE_CHECKING:
    from torchvision import models

__all__ = [
    "check_shapes",
    "check_values",
    "load_state",
    "load_weights",
    "peek_metadata",
    "pretrained_weights",
    "recorded_normalization",
    "trained_model",
]

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, file: Path | str) -> dict[str, str]:
    """Load weights from a file into a model, all or nothing. No code of the file runs.

    The file may be a training checkpoint: the one dict of tensors in it that fits is loaded,
    whatever its key. A prefix common to all names, such as ``module.``, is taken out or added,
    and missing counters of batch norms (``num_batches_tracked``) are zero.

    Args:
        model: The network; it is unchanged if the file does not fit.
        file: A safetensors file, a torch file, the index of a file in parts (``*.index.json``),
            or the folder of one of these.

    Returns:
        The metadata of a safetensors file; empty for any other.

    Raises:
        WeightsError: The file is missing, damaged or holds no dict of tensors; its names or shapes
            differ from those of ``model``; a value is not finite; or loading could run code.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = {"epoch": 3, "net": nn.DataParallel(model).state_dict()}
        ...     torch.save(checkpoint, folder + "/last.pt")
        ...     load_weights(model, folder + "/last.pt")
        {}
    """
    content, metadata = read_weights(file)
    load_state(model, content, source=str(file))
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


def load_state(model: nn.Module, content: object, *, source: str) -> None:
    """Load the tensors in ``content`` into ``model`` after checking names, shapes and values.

    Args:
        model: The network; it is unchanged if a check fails.
        content: Tensors by name, or a checkpoint with one dict of them; see `fitting_state`.
        source: The name of ``content`` in messages, for example the path of a file.

    Raises:
        WeightsError: A name is missing or unexpected, a shape differs or a value is not finite.
    """
    state, expected = check_shapes(model, content, source=source), model.state_dict()
    for name in state:
        if not is_lazy(expected[name]) and expected[name].is_meta:
            raise WeightsError(
                f"{name} of the model is on the meta device, which holds no values; call "
                "model.to_empty(device='cpu') first."
            )
    check_values(model, state, source=source)
    # Some modules refuse a state without the version of its format, which files may lack.
    versions = {**getattr(expected, "_metadata", {}), **getattr(state, "_metadata", {})}
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = versions
    model.load_state_dict(versioned)


def check_values(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise a WeightsError if a tensor for a model holds a value that is not finite.

    Args:
        model: The network, perhaps on the ``meta`` device.
        state: A tensor for each name of its state dict.
        source: The name of the file in the message.
    """
    expected = model.state_dict()
    for name, tensor in state.items():
        if not _is_plausible(tensor, expected[name]):
            raise WeightsError(
                f"{source} holds a value that is not finite in {name}; the training that wrote it "
                "diverged, so use an earlier checkpoint."
            )


def _is_plausible(values: Tensor, own: Tensor) -> bool:
    """Whether values are finite, but where the model's own are the same infinity.

    Masks and limits of activations are buffers that hold infinities.
    """
    if not values.is_floating_point():
        return True
    wide = values if values.element_size() > 1 else values.float()  # as of float8
    finite = wide.isfinite()
    if finite.all():
        return True
    if is_lazy(own) or own.is_meta:
        return False
    return bool((finite | (wide.isinf() & (wide == own.to(wide)))).all())


def check_shapes(model: nn.Module, content: object, *, source: str) -> dict[str, Tensor]:
    """The tensors in ``content`` that fit a model, with its names; their shapes are checked.

    Args:
        model: The network, perhaps on the ``meta`` device.
        content: As for `load_state`.
        source: The name of ``content`` in messages.

    Raises:
        WeightsError: A name is missing or unexpected, or a shape differs.
    """
    state, expected = fitting_state(content, model, source), model.state_dict()
    for name, tensor in state.items():
        wanted = expected[name]
        if not is_lazy(wanted) and tensor.shape != wanted.shape:
            raise WeightsError(
                f"{source} does not fit the model: {name} has shape {tuple(tensor.shape)}, but "
                f"the model has {tuple(wanted.shape)}; choose the model and the number "
                "of classes that the weights were made for."
            )
    return state


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
    whiten(model, training_data)

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
