"""Second-order loss of every choice of every layer, from a constant number of passes.

A choice changes a layer's weight W by D. To second order, the divergence of the network with this
one change from the dense network is 1/2 E[<D, dL/dW>^2], the Fisher matrix along D, where L is the
loss of one sample for targets that are sampled from the model itself. One forward and one backward
pass over the samples gives it for all choices of all layers: dL/dW is a sum over the positions of
a sample, g x^T, and neither its positions nor its rows and columns are taken to be independent, as
the Kronecker-factored norm ``fisher`` takes them to be.

Corrections after truncation count. Where the mean of the error is removed, by a bias or a batch
norm, x is centred. A batch norm behind the layer whose statistics are re-estimated also gives each
output back its variance, so W changes to s What with a scale for each output; D is the difference.

References:
    Martens, JMLR 2020 (New insights and perspectives on the natural gradient method), sections 5
    and 9.2: the Fisher matrix as the curvature of the divergence, and sampled targets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankNAS.compression.batch_norm import tracking_layers
from rankNAS.compression.calibration import Recorder, statistics_key
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.patches import folded, patches
from rankNAS.copies import unchanged
from rankNAS.data.samples import Samples
from rankNAS.decompositions.norms import Statistics
from rankNAS.exceptions import WeightsError, WriteError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.tasks.base import Task, at_least_float32
from rankNAS.tasks.feeding import InputBatches, input_batches
from rankNAS.trees import device_of, rows

__all__ = ["second_order_losses"]

logger = logging.getLogger(__name__)
VERSION = 1  # part of the key of cached losses: raise it when the losses change
BATCH = 128  # samples per pass
PATCHES = 1 << 24  # elements of the patches that are made at a time
CHANGES = 1 << 28  # elements of all changes D that are kept; beyond it, fewer choices are measured
DIRECT = 2  # positions up to which changes meet the inputs first, without gradients of samples
LARGEST_SCALE = 30.0  # of an output that a choice all but removes
FEWEST = 8  # measured choices of a layer; the others are interpolated


def second_order_losses(
    factorisation: Factorisation,
    samples: Samples,
    task: Task,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    seed: int = 0,
    batch_size: int = BATCH,
    cache: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """The second-order loss of each choice of each layer alone, per prediction.

    Args:
        factorisation: The dense model and the factors.
        samples: Calibration samples; labels are not read.
        task: Reads inputs and outputs.
        statistics: From `calibrate`, if batch-norm statistics are re-estimated after truncation.
        seed: Random seed of the sampled targets.
        batch_size: Samples per pass.
        cache: Folder in which the result is cached.
        on_batch: Called with (batches done, batches in total).

    Returns:
        By layer, the losses of its choices in the order of the space, in nats for tasks with a
        likelihood; 0 for dense.
    """
    model = factorisation.model
    batches = input_batches(samples, batch_size, task=task, device=device_of(model), even=True)
    path = None
    if cache is not None:
        key = _key(factorisation, batches, task, bool(statistics), seed, batch_size)
        path = cache / f"{key}.safetensors"
        if (cached := _read(path, factorisation)) is not None:
            return cached
    most = CHANGES // max(1, len(factorisation.layers))
    normed = _followed_by_batch_norm(factorisation, batches) if statistics else set()
    along = {
        name: _Along(layer, most, (statistics or {})[name] if name in normed else None)
        for name, layer in factorisation.layers.items()
    }
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(factorisation.space.layers, along, task, generator)
    with unchanged(model), recorder.recording(model, gradients=True):
        for number, size in enumerate(batches.sizes):
            for found in along.values():
                found.begin(size)
            recorder.run(model, batches, number, backward=True)
            for found in along.values():
                found.end()
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    count = max(1, recorder.predictions)
    losses = {name: found.losses(count) for name, found in along.items()}
    if path is not None:
        _write(path, losses)
    return losses


def _key(
    factorisation: Factorisation,
    batches: InputBatches,
    task: Task,
    normed: bool,
    seed: int,
    batch_size: int,
) -> str:
    """Content key of the model, the inputs, the choices and their errors."""
    space = factorisation.space
    known = statistics_key(factorisation.model, space, batches, task, "losses", seed)
    labels = {name: [str(c) for c in layer.choices] for name, layer in space.layers.items()}
    errors = {n: torch.tensor(e, dtype=torch.float64) for n, e in factorisation.errors().items()}
    return fingerprint(errors, f"{VERSION} {known} {normed} {batch_size} {labels}")


def _write(path: Path, losses: Mapping[str, list[float]]) -> None:
    tensors = {name: torch.tensor(found, dtype=torch.float64) for name, found in losses.items()}
    try:
        write_tensors(path, tensors)
    except WriteError as error:
        logger.warning("the losses of the choices could not be cached: %s", error)


def _read(path: Path, factorisation: Factorisation) -> dict[str, list[float]] | None:
    """The cached losses; None if absent or damaged."""
    if not path.exists():
        return None
    try:
        tensors, _ = read_tensors(path)
        return {name: tensors[name].tolist() for name in factorisation.layers}
    except (WeightsError, KeyError) as error:
        logger.warning("the cached losses %s are unreadable and are made again: %s", path, error)
        return None


class _Along:
    """The squared inner products of a layer's weight gradients with its changes.

    Args:
        factors: The layer's factors.
        most: The largest number of elements of its changes together.
        statistics: Of its inputs, if a batch norm corrects the variance of its outputs.
    """

    def __init__(
        self, factors: LayerFactors, most: int, statistics: Statistics | None = None
    ) -> None:
        self._factors, self._shape = factors, factors.layer.shape
        self._measured = _spread(factors.errors(), max(FEWEST, most // factors.weight.numel()))
        W = factors.weight.float().flatten(2)
        choices = [factors.layer.choices[i] for i in self._measured]
        changed = [factors.factors[c.operator].weight(c.rank).to(W) for c in choices]
        if statistics is not None:
            C = _covariance(statistics).to(W)
            changed = [_rescaled(What, W, C) for What in changed]
        order = torch.argsort(folded(self._shape))
        # As rows of `patches`: (choices, g, o, n).
        self._changes = torch.stack([W - What for What in changed])[..., order] if changed else W
        mean = factors.norm.mean
        self._mean = None if mean is None else mean.float()[:, order]
        self._inputs: list[Tensor] = []
        self._products = self._sum = torch.zeros((), dtype=torch.float64)

    def begin(self, samples: int) -> None:
        """Begin a pass over some samples."""
        self._samples = samples
        self._products = torch.zeros((), dtype=torch.float64)

    def add_input(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Keep the inputs of a call until its gradient is known."""
        self._inputs.append(x)

    def add_gradient(self, gradient: Tensor, mask: Tensor | None = None) -> None:
        """Add the inner products of a call's weight gradients with the changes."""
        x = self._inputs.pop(0)
        if not len(self._measured):
            return
        shape, kernel = self._shape, len(self._shape.kernel)
        gradient, x = at_least_float32(gradient), at_least_float32(x)
        if kernel:
            gradient = gradient.movedim(-1 - kernel, -1)
            x = x.reshape(-1, *x.shape[-kernel - 1 :])
        else:
            x, gradient = (by_sample(t, self._samples) for t in (x, gradient))
        count = len(x)
        G = gradient.reshape(count, -1, shape.groups, shape.outputs // shape.groups)
        step = max(1, PATCHES // max(1, G.shape[1] * shape.groups * shape.width))
        products = [
            self._along(part, g) for part, g in zip(x.split(step), G.split(step), strict=True)
        ]
        found = torch.cat(products, 1).double()
        if count % self._samples == 0:  # several rows may belong to one sample
            found = found.reshape(len(found), self._samples, -1).sum(-1)
        self._products = self._products + found

    def end(self) -> None:
        """End a pass: square what belongs to one sample."""
        self._inputs.clear()
        if self._products.dim():
            self._sum = self._sum + self._products.square().sum(1)

    def _along(self, x: Tensor, gradient: Tensor) -> Tensor:
        """<D, dL/dW> by choice and sample, (choices, N), from gradients (N, T, g, o)."""
        shape, count = self._shape, len(x)
        P = patches(shape, x)  # (g, N T, n)
        P = P.reshape(shape.groups, count, -1, shape.width)
        G = gradient.permute(2, 0, 3, 1)  # (g, N, o, T)
        if P.shape[2] <= DIRECT:
            centred = P if self._mean is None else P - self._mean[:, None, None, :]
            changes = self._changes @ centred.flatten(1, 2).mT  # (choices, g, o, N T)
            weighted = (changes * G.transpose(1, 2).flatten(2)).sum((1, 2))
            return weighted.reshape(len(weighted), count, -1).sum(-1)
        found = G @ P
        if self._mean is not None:
            found = found - G.sum(-1, keepdim=True) * self._mean[:, None, None, :]
        by_row = found.transpose(0, 1).reshape(count, -1)  # (N, g o n)
        return self._changes.reshape(len(self._changes), -1) @ by_row.T

    def losses(self, predictions: int) -> list[float]:
        """The losses of all choices; those between measured ones are interpolated."""
        errors = np.maximum(self._factors.errors(), 1e-12)
        if not len(self._measured):
            return [0.0] * len(errors)
        measured = (0.5 * self._sum / predictions).expand(len(self._measured)).tolist()
        found = np.zeros(len(errors))
        found[list(self._measured)] = measured
        others = [i for i in range(1, len(errors)) if i not in set(self._measured)]
        if others:
            known = sorted(self._measured, key=lambda i: errors[i])
            x, y = (np.log(np.maximum(v[known], 1e-30)) for v in (errors, found))
            found[others] = np.exp(np.interp(np.log(errors[others]), x, y))
        result: list[float] = found.tolist()
        return result


def _covariance(statistics: Statistics) -> Tensor:
    mean = statistics.mean
    return statistics.input_second_moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _rescaled(What: Tensor, W: Tensor, C: Tensor) -> Tensor:
    """The weight What (g, o, n) with the variances that W has for inputs of covariance C."""
    wanted, found = (((A @ C) * A).sum(-1).clamp_min(0) for A in (W, What))
    scale = (wanted / found.clamp_min(torch.finfo(W.dtype).tiny)).sqrt().clamp_max(LARGEST_SCALE)
    return scale.unsqueeze(-1) * What


def _followed_by_batch_norm(factorisation: Factorisation, batches: InputBatches) -> set[str]:
    """The layers whose output a batch norm takes that keeps running statistics."""
    model = factorisation.model
    found: set[str] = set()
    outputs: list[tuple[str, Any]] = []  # they are kept, as their identities are compared

    def on_layer(name: str, module: nn.Module, args: object, output: Any) -> None:
        outputs.append((name, output))

    def on_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.update(name for name, output in outputs if args and args[0] is output)

    handles = [
        model.get_submodule(path).register_forward_hook(partial(on_layer, name))
        for name, layer in factorisation.space.layers.items()
        for path in layer.paths
    ]
    handles += [norm.register_forward_pre_hook(on_norm) for norm in tracking_layers(model)]
    try:
        with unchanged(model), torch.no_grad():
            rows(batches[0], slice(0, 2), batches.sizes[0]).run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def by_sample(x: Tensor, samples: int) -> Tensor:
    """Inputs or gradients (*, features) of a linear layer with the samples along axis 0.

    The axis of the samples is the first of the two leading ones that has their number. Rows of an
    axis whose length is a multiple of it are taken to be in the order of the samples. Otherwise
    each row counts as a sample of its own.
    """
    if x.dim() == 1:
        return x[None]
    if x.shape[0] != samples and x.dim() > 2 and x.shape[1] == samples:
        x = x.transpose(0, 1)
    if x.shape[0] % samples == 0:
        return x.reshape(samples, -1, x.shape[-1])
    return x.reshape(-1, 1, x.shape[-1])


def _spread(errors: list[float], most: int) -> list[int]:
    """At most so many choices other than dense, evenly spread over the order of their errors."""
    ordered = sorted(range(1, len(errors)), key=lambda i: (errors[i], i))
    if len(ordered) <= most:
        return ordered
    steps = np.linspace(0, len(ordered) - 1, most).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(steps.tolist())]
