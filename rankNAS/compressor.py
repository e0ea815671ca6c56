"""Compression of a model in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.data.loading import DataSource
from rankNAS.engine import search
from rankNAS.exceptions import UsageError
from rankNAS.models import artifact
from rankNAS.search_spaces.wrappers import innermost
from rankNAS.search_spaces.zoo.huggingface import named_model
from rankNAS.settings import Settings
from rankNAS.strategies.base import Strategy
from rankNAS.tasks.base import Task
from rankNAS.trees import device_of

__all__ = ["Compression", "compress", "compress_", "save"]

TRIALS = 8


@dataclass(frozen=True)
class Compression:
    """What `compress` found; a compressed network has it as its attribute ``ranknas``.

    Args:
        allocation: The choice of each layer.
        metrics: The task's metrics on the validation samples.
        dense: Those of the dense model, with its costs.
        costs: The exact costs of the network.
        task: The task in words.
    """

    allocation: Allocation
    metrics: Mapping[str, float]
    dense: Mapping[str, float]
    costs: Mapping[str, float]
    task: str


def compress(
    model: nn.Module | str,
    data: DataSource,
    *,
    budget: float | Mapping[str, float],
    strategy: str | Strategy = "auto",
    task: str | Task | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    n_trials: int = TRIALS,
    time_limit: float | None = None,
    **settings: Any,
) -> nn.Module:
    """A compressed copy of a trained model.

    Args:
        model: The dense model; it is not changed. Or ``hf:FOLDER``, the model of a folder for
            ``transformers``.
        data: A pair of training and test data, or one set alone, labelled or not. For the forms of
            data see `rankNAS.load_data`.
        budget: The fraction kept of the MACs, or by cost name the fraction kept.
        strategy: A name, or a `Strategy`.
        task: As for `search`.
        seed: The random seed.
        device: Where to evaluate; the model's device by default. The network is on the model's
            device.
        n_trials: The number of allocations that are evaluated, probes not counted.
        time_limit: As for `search`.
        settings: Fields of `Settings`.

    Returns:
        The network in evaluation mode. ``network.ranknas`` has its `Compression`; `save` writes
        it to a file.

    Raises:
        BudgetError: Nothing can meet the budget.
        DataError: The data do not fit the model or the task.
        UsageError: An unknown setting, or the strategy cannot do what is asked.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> small = compress(model, torch.randn(100, 64), budget=0.5, strategy="solve")
        >>> small.ranknas.costs["macs"] <= 0.5 * small.ranknas.dense["macs"]
        True
    """
    model = named_model(model)
    home = device_of(model)
    study = search(
        model,
        data,
        task=task,
        budget={"macs": float(budget)} if isinstance(budget, int | float) else budget,
        strategy=strategy,
        n_trials=n_trials,
        time_limit=time_limit,
        seed=seed,
        settings=_settings(settings),
        device=home if device is None else device,
    )
    best = study.best
    network = study.materialise(best.allocation).to(home)
    costs = study.evaluator.costs(best.allocation)
    measured = study.metrics_of(best, network)
    metrics = {name: measured[name] for name in study.task.directions if name in measured}
    found = Compression(best.allocation, metrics, study.dense, costs, study.task.describe())
    network.ranknas = found  # type: ignore[assignment]
    return network


def compress_(model: nn.Module, data: DataSource, **options: Any) -> nn.Module:
    """Compress a model in place; the arguments are those of `compress`.

    Layers are replaced, and batch-norm statistics and refitted weights are written into the model.
    The model ends in evaluation mode.

    Returns:
        The same model.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model is compress_(model, torch.randn(100, 64), budget=0.5, strategy="solve")
        True
    """
    network = compress(model, data, **options)
    _take_over(innermost(model), network)
    model.ranknas = network.ranknas
    return model.eval()


def save(network: nn.Module, path: Path | str) -> Path:
    """Write a network of `compress` as safetensors; `rankNAS.load` reads it.

    Raises:
        UsageError: The network is not from `compress`.
        WriteError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> def dense():
        ...     return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
        >>> small = compress(dense(), torch.randn(100, 64), budget=0.5, strategy="solve")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(small, folder + "/small.safetensors").name
        'small.safetensors'
    """
    found = getattr(network, "ranknas", None)
    if not isinstance(found, Compression):
        raise UsageError(
            f"a {type(network).__name__} was given that is not from `rankNAS.compress`; save the "
            "network of a study with `study.save(path)`."
        )
    metrics = {**found.metrics, **found.costs}
    return artifact.save(network, found.allocation, path, metrics=metrics)


def _settings(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except TypeError:
        known = sorted(Settings.__dataclass_fields__)
        wrong = ", ".join(sorted(set(given) - set(known)))
        raise UsageError(f"unknown setting {wrong}; known: {', '.join(known)}.") from None


def _take_over(model: nn.Module, network: nn.Module) -> None:
    """Make a model compute what a network of the same structure does, layer by layer."""
    own = dict(model.named_children())
    for name, found in network.named_children():
        if type(own.get(name)) is type(found) and _same_shapes(own[name], found):
            _take_over(own[name], found)
        else:
            setattr(model, name, found)
    with torch.no_grad():
        tensors = dict(network.named_parameters(recurse=False)) | dict(
            network.named_buffers(recurse=False)
        )
        for name, tensor in tensors.items():
            getattr(model, name).copy_(tensor)


def _same_shapes(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have tensors of equal names and shapes of their own."""
    shapes = [
        {
            n: t.shape
            for n, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))
        }
        for m in (first, second)
    ]
    return shapes[0] == shapes[1]
