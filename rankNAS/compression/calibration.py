"""Calibration: the second moments of layer inputs and output gradients, streamed over data.

Never holds more than one batch of activations; a layer's sums are (g, n, n) and (g, o, o) however
much data is read. Results are cached on disk under a key of the model's weights and the data.

References:
    Martens and Grosse, ICML 2015: gradients for labels sampled from the model give the Fisher.
    Grosse and Martens, ICML 2016: the convolutional case, patches summed over positions.
    Ji et al., EMNLP Findings 2024 (Bolaco), section 3: the pooled covariance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.decompositions.norms import NormName, Statistics
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError, WeightsError, WriteError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace

__all__ = ["calibrate", "folded", "patches", "unbiased_covariance"]

logger = logging.getLogger(__name__)
MAX_POSITIONS = 256  # patches of one input that enter C; neighbours are nearly copies
POOLED = 32  # samples of a group whose covariance is pooled, as in the code released with Bolaco


def calibrate(
    model: nn.Module,
    space: SearchSpace,
    inputs: Tensor,
    *,
    norm: NormName = "fisher",
    batch_size: int = 128,
    seed: int = 0,
    cache: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Statistics]:
    """Statistics of every layer of a space.

    Args:
        model: The dense model that was compiled, in evaluation mode.
        space: Its space.
        inputs: Calibration inputs, (samples, …).
        norm: ``weight`` needs no statistics and returns none; ``fisher`` needs a backward pass
            and class logits as the model's output. ``pooled`` averages the means and the unbiased
            covariances of consecutive groups of 32 samples, or a few more where these would not
            divide the samples.
        batch_size: Samples a pass; those of a group where covariances are pooled.
        seed: Of the sampled labels and positions.
        cache: Folder to keep the result in.
        on_batch: Called with (batches done, batches in all).

    Raises:
        RankNASError: The statistics are not finite.
    """
    if norm == "weight":
        return {}
    model = separate_attention(model)
    path = (
        None if cache is None else cache / f"{_key(model, space, inputs, norm, seed)}.safetensors"
    )
    if path is not None and (cached := _read(path, space, inputs.device)) is not None:
        return cached
    sums = _Sums(space, seed)
    pooled = norm == "pooled"
    groups = max(1, len(inputs) // POOLED)
    chunks = inputs.tensor_split(groups) if pooled else inputs.split(batch_size)
    with sums.recording(model, gradients=norm == "fisher"):
        for done, batch in enumerate(chunks, 1):
            _pass(model, batch, sums, backward=norm == "fisher")
            if pooled:
                sums.close_group()
            if on_batch is not None:
                on_batch(done, len(chunks))
    statistics = sums.finish()
    if path is not None:
        _write(path, statistics)
    return statistics


def _pass(model: nn.Module, batch: Tensor, sums: _Sums, *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            model(batch)
        return
    with torch.enable_grad():
        logits = model(batch)
        logits = logits.reshape(-1, logits.shape[-1])
        probabilities = logits.detach().softmax(-1)
        uniform = torch.rand(len(logits), 1, generator=sums.generator).to(probabilities)
        labels = (probabilities.cumsum(-1) < uniform).sum(-1).clamp_max(logits.shape[-1] - 1)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        # Gradients with respect to the recorded outputs alone: parameters need none.
        # Those of layers that the logits do not depend on are zero.
        outputs = [y for _, y in sums.outputs]
        gradients = torch.autograd.grad(loss, outputs, materialize_grads=True)
        for (name, _), gradient in zip(sums.outputs, gradients, strict=True):
            sums.add_gradient(name, gradient)
    sums.outputs.clear()


class _Sums:
    """Running sums of one calibration, in float64."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.layers = space.layers
        self.generator = torch.Generator().manual_seed(seed)
        self.moment: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] = {}
        self.patches: dict[str, int] = {}
        self.gradients: dict[str, int] = {}
        self.groups = 0
        self.covariance: dict[str, Tensor] = {}
        self.group_mean: dict[str, Tensor] = {}
        self.outputs: list[tuple[str, Tensor]] = []

    @contextmanager
    def recording(self, model: nn.Module, *, gradients: bool) -> Iterator[None]:
        """Hooks in place, parameters frozen: the first layer's output starts the tape."""
        handles = []
        modules = {
            id(model.get_submodule(p)): (p, x) for x in self.layers.values() for p in x.paths
        }
        for path, layer in modules.values():
            hook = self._hook(layer, gradients)
            handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        required = [p for p in model.parameters() if p.requires_grad]
        for parameter in required:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in required:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer, gradients: bool) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            self.add_input(layer.name, (*args, *kwargs.values())[0].detach())
            if not gradients:
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            # The copy is what the network goes on with, so that an in-place activation does not
            # overwrite the tensor whose gradient is asked for.
            self.outputs.append((layer.name, output))
            return output.clone()

        return hook

    def add_input(self, name: str, x: Tensor) -> None:
        P = patches(self.layers[name].shape, x, self.generator)  # (g, N, n)
        moment, mean = (P.mT @ P).double(), P.sum(1).double()
        self.moment[name] = self.moment.get(name, 0) + moment
        self.mean[name] = self.mean.get(name, 0) + mean
        self.patches[name] = self.patches.get(name, 0) + P.shape[1]

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        shape = self.layers[name].shape
        if shape.kernel:
            gradient = gradient.movedim(-1 - len(shape.kernel), -1)
        D = gradient.reshape(-1, shape.groups, shape.outputs // shape.groups).transpose(0, 1)
        self.gradient[name] = self.gradient.get(name, 0) + (D.mT @ D).double()
        self.gradients[name] = self.gradients.get(name, 0) + D.shape[1]

    def close_group(self) -> None:
        """Add the group's covariance and mean to those of the groups before; start another."""
        self.groups += 1
        for name in self.layers:
            count, total = self.patches.pop(name), self.mean.pop(name)
            covariance = unbiased_covariance(self.moment.pop(name), total, count)
            self.covariance[name] = self.covariance.get(name, 0) + covariance
            self.group_mean[name] = self.group_mean.get(name, 0) + total / count

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        order = folded(self.layers[name].shape)
        if not self.groups:
            moment, mean = self.moment[name], self.mean[name]
            moment, mean = moment / self.patches[name], mean / self.patches[name]
        else:
            mean = self.group_mean[name] / self.groups
            covariance = self.covariance[name] / self.groups
            moment = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return moment[:, order][:, :, order], mean[:, order]

    def finish(self) -> dict[str, Statistics]:
        statistics = {}
        for name in self.layers:
            gradient = self.gradient.get(name)
            result = Statistics(
                *self._moments(name),
                None if gradient is None else gradient / self.gradients[name],
            )
            for tensor in (result.input_second_moment, result.output_gradient_second_moment):
                if tensor is not None and not tensor.isfinite().all():
                    raise RankNASError(
                        f"the calibration statistics of layer {name!r} are not finite; look for "
                        "NaN or infinity in the calibration data or in the model's activations."
                    )
            statistics[name] = result
        return statistics


def unbiased_covariance(
    moment: Tensor,  # (*batch, n, n)
    total: Tensor,  # (*batch, n)
    count: int,
) -> Tensor:  # (*batch, n, n)
    """The covariance of samples from the sum of their outer products and their own sum.

    Divides by one less than the number of samples; of a single one it is zero.
    """
    outer = total.unsqueeze(-1) * total.unsqueeze(-2)
    return (moment - outer / count) / max(1, count - 1)


def patches(
    shape: LayerShape,
    x: Tensor,
    generator: torch.Generator | None = None,
    most: int = MAX_POSITIONS,
) -> Tensor:  # -> (g, N, n)
    """The input patches a layer multiplies with its folded weight, their elements reordered.

    Args:
        shape: The layer.
        x: Its input: (*, features), (batch, channels, length) or (batch, channels, height, width).
        generator: Draws positions of each input; None takes all.
        most: Positions that are drawn.

    Returns:
        One patch a row. Its elements are ordered by kernel element, then by channel, as they can
        be read many times faster; `folded` gives their places in the order of the folded weight.
    """
    g, channels = shape.groups, shape.inputs // shape.groups
    if not shape.kernel:
        return x.reshape(-1, g, channels).transpose(0, 1)
    x = x.reshape(-1, *x.shape[-len(shape.kernel) - 1 :])
    x = _pad(shape, x)
    reading = _positions(shape, x.shape[2:], generator, most).to(x.device)  # (kernel, positions)
    rows = x.movedim(1, -1).flatten(1, -2)  # (batch, pixels, g c)
    rows = rows.index_select(1, reading.T.flatten()).reshape(
        -1, len(reading), g, shape.inputs // g
    )
    return rows.permute(2, 0, 1, 3).flatten(2)


def folded(shape: LayerShape) -> Tensor:  # -> (n,)
    """Of each column of the folded weight, its place in a row of `patches`."""
    kernel = math.prod(shape.kernel)
    return torch.arange(shape.width).reshape(kernel, -1).T.flatten()


def _positions(
    shape: LayerShape, size: tuple[int, ...], generator: torch.Generator | None, most: int
) -> Tensor:  # -> (kernel, positions)
    """Where in the flattened padded input each kernel element reads, for the drawn positions."""
    starts, offsets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for length, k, d, s in zip(size, shape.kernel, shape.dilation, shape.stride, strict=True):
        along = torch.arange(0, length - d * (k - 1), s)
        starts = (starts[:, None] * length + along).flatten()
        offsets = (offsets[:, None] * length + d * torch.arange(k)).flatten()
    if generator is not None and len(starts) > most:
        starts = starts[torch.randperm(len(starts), generator=generator)[:most]]
    return offsets[:, None] + starts


def _pad(shape: LayerShape, x: Tensor) -> Tensor:
    sides = [side for pair in reversed(shape.explicit_padding) for side in pair]
    if not any(sides):
        return x
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return functional.pad(x, sides, mode=mode)


def _key(model: nn.Module, space: SearchSpace, inputs: Tensor, norm: str, seed: int) -> str:
    """Content key: layers, weights, inputs and settings."""
    layers = [f"{name} {layer.shape}" for name, layer in space.layers.items()]
    salt = "\n".join([f"2 {norm} {seed} {MAX_POSITIONS} {model}", *layers])
    return fingerprint({**model.state_dict(), "inputs": inputs}, salt)


def _write(path: Path, statistics: Mapping[str, Statistics]) -> None:
    tensors = {}
    for name, s in statistics.items():
        tensors[f"moment:{name}"], tensors[f"mean:{name}"] = s.input_second_moment, s.mean
        if s.output_gradient_second_moment is not None:
            tensors[f"gradient:{name}"] = s.output_gradient_second_moment
    try:
        write_tensors(path, tensors)
    except WriteError as error:
        logger.warning("the calibration could not be cached: %s", error)


def _read(path: Path, space: SearchSpace, device: torch.device) -> dict[str, Statistics] | None:
    """The cached statistics, or None; a damaged file is made again."""
    if not path.exists():
        return None
    try:
        tensors, _ = read_tensors(path, device)
        return {
            name: Statistics(
                tensors[f"moment:{name}"], tensors[f"mean:{name}"], tensors.get(f"gradient:{name}")
            )
            for name in space.layers
        }
    except (WeightsError, KeyError) as error:
        logger.warning(
            "the cached calibration %s is unreadable and is made again: %s", path, error
        )
        return None
