"""Calibration: streamed second moments of layer inputs and output gradients.

At most one batch of activations is in memory. The sums of a layer are (g, n, n) and (g, o, o) for
any amount of data. Results are cached on disk under a key of the model's weights and the data.

References:
    Martens and Grosse, ICML 2015: gradients for labels sampled from the model (Fisher matrix).
    Grosse and Martens, ICML 2016: the convolutional case, patches summed over positions.
    Ji et al., EMNLP Findings 2024 (Bolaco), section 3: the pooled covariance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from rankNAS.compression.accumulators import MomentAccumulator
from rankNAS.compression.patches import MAX_POSITIONS
from rankNAS.compression.siblings import shrunk_towards_siblings
from rankNAS.copies import unchanged
from rankNAS.decompositions.norms import NormName, Statistics
from rankNAS.exceptions import RankNASError, WeightsError, WriteError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches, InputSource, input_batches
from rankNAS.tasks.layout import Layout
from rankNAS.tasks.matching import Matching
from rankNAS.trees import device_of, named_tensors

__all__ = ["POOLED", "Accumulator", "Recorder", "calibrate", "statistics_key"]

logger = logging.getLogger(__name__)
POOLED = 32  # samples per group of the pooled covariance, as in the released code of Bolaco


def calibrate(
    model: nn.Module,
    space: SearchSpace,
    samples: InputSource,
    task: Task | None = None,
    *,
    norm: NormName = "fisher",
    batch_size: int = 128,
    seed: int = 0,
    cache: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Statistics]:
    """Calibration statistics of every layer of a space.

    Args:
        model: The compiled dense model, in evaluation mode.
        space: Its space.
        samples: Calibration samples, labelled or not; a tensor holds one sample along axis 0.
        task: Reads inputs and outputs; None for inputs alone and a model that returns class
            logits.
        norm: ``weight`` needs no statistics and returns none; ``fisher`` needs a backward pass
            and samples its targets from the task's likelihood. ``pooled`` averages the means and
            the unbiased covariances of consecutive groups of 32 samples; groups are slightly
            larger if 32 does not divide the samples.
        batch_size: Samples per pass; ``pooled`` uses its groups instead.
        seed: Random seed of the sampled targets and positions.
        cache: Folder in which the result is cached.
        on_batch: Called with (batches done, batches in total).

    Raises:
        RankNASError: The statistics are not finite.
    """
    if norm == "weight":
        return {}
    model = with_plain_layers(model, space.layers)
    device = device_of(model)
    pooled = norm == "pooled"
    groups = max(1, len(samples) // POOLED) if pooled else None
    # Gradients of a batch of one sample have no scale.
    even = len(samples) % batch_size == 1
    chunks = input_batches(samples, batch_size, task=task, device=device, even=even, count=groups)
    path = None
    if cache is not None:
        path = cache / f"{statistics_key(model, space, chunks, task, norm, seed)}.safetensors"
    if path is not None and (cached := _read(path, space, device)) is not None:
        return cached
    generator = torch.Generator().manual_seed(seed)  # layers share it
    sums = {
        name: MomentAccumulator(layer, generator, absolute=norm == "asvd")
        for name, layer in space.layers.items()
    }
    recorder = Recorder(space.layers, sums, task or Matching(by="kl", layout=Layout()), generator)
    with unchanged(model), recorder.recording(model, gradients=norm == "fisher"):
        for done in range(1, len(chunks) + 1):
            recorder.run(model, chunks, done - 1, backward=norm == "fisher")
            if pooled:
                for found in sums.values():
                    found.close_group()
            if on_batch is not None:
                on_batch(done, len(chunks))
    statistics = statistics_of(sums, space.layers)
    if path is not None:
        _write(path, statistics)
    return statistics


def statistics_of(
    sums: Mapping[str, MomentAccumulator], layers: Mapping[str, Layer]
) -> dict[str, Statistics]:
    """The statistics of layers; those of experts lean on their siblings where tokens are few.

    Raises:
        RankNASError: A layer was not called, or its statistics are not finite.
    """
    tokens = {name: found.tokens for name, found in sums.items()}
    called = {name: found.statistics() for name, found in sums.items() if tokens[name]}
    known = shrunk_towards_siblings({name: layers[name] for name in sums}, called, tokens)
    for name in sums:
        if name not in known:
            raise RankNASError(
                f"layer {name!r} is not called with any of the calibration data; give more of "
                "them, or let the layer stay dense (`exclude`)."
            )
    return known


class Accumulator(Protocol):
    """What is summed over the inputs of a layer and the gradients at its outputs."""

    def add_input(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the inputs of a call; the mask says which positions (N, T) count."""

    def add_gradient(self, gradient: Tensor, mask: Tensor | None = None) -> None:
        """Add the loss gradients at the outputs of a call, in the order of the calls."""


class Recorder:
    """Accumulates what concerns every layer during forward and backward passes.

    Args:
        layers: The layers by name.
        sums: An accumulator for each of them.
        task: Reads outputs.
        generator: Samples the targets.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sums: Mapping[str, Accumulator],
        task: Task,
        generator: torch.Generator,
    ) -> None:
        self._layers, self._sums, self._task = layers, sums, task
        self.predictions = 0  # of all backward passes
        self._mask: Tensor | None = None
        self._forward = True  # false while a backward pass runs checkpointed layers again
        self._generator = generator
        self._outputs: list[tuple[str, Tensor]] = []

    @contextmanager
    def recording(self, model: nn.Module, *, gradients: bool) -> Iterator[None]:
        """Context in which the model has hooks and its parameters need no gradient.

        Backward passes start at the output of the first layer.
        """
        handles = []
        modules = {
            id(model.get_submodule(p)): (p, x) for x in self._layers.values() for p in x.paths
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
            x = (*args, *kwargs.values())[0].detach()
            if self._forward:
                self._sums[layer.name].add_input(x, self._mask)
            if not gradients:
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            # The network continues with a copy, so that an in-place activation does not overwrite
            # the tensor whose gradient is needed.
            if self._forward:
                self._outputs.append((layer.name, output))
            return output.clone()

        return hook

    def run(self, model: nn.Module, batches: InputBatches, number: int, *, backward: bool) -> None:
        """Run a forward pass; with ``backward``, also a backward pass for sampled targets."""
        if not backward:
            with torch.no_grad(), self.counting(batches.mask(number)):
                batches[number].run(model)
            return
        with self.counting(batches.mask(number), gradients=True):
            with self._task.compact(model):
                output = batches[number].run(model)
            self.backward([self.loss(output, batches.batch(number))])

    def loss(self, output: Any, batch: Any) -> Tensor:
        """The loss of a network's output for sampled targets."""
        prediction = self._task.predict(output, batch)
        self.predictions += len(prediction)
        return prediction.sampled_loss(self._generator)

    @contextmanager
    def counting(self, mask: Tensor | None, *, gradients: bool = False) -> Iterator[None]:
        """Context of a pass over one batch, of which the positions of a mask count."""
        self._mask = mask
        if not gradients:
            yield
            self._outputs.clear()
            return
        with torch.enable_grad(), _recorded_checkpoints():
            yield
        self._outputs.clear()

    def backward(
        self,
        ends: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
        starts: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Add the gradients at the recorded outputs; return those of other tensors.

        Args:
            ends: Where the backward pass begins.
            gradients: The gradients there; None for a loss.
            starts: The other tensors.
        """
        # Gradients only with respect to the recorded outputs; parameters need none.
        # Layers that do not affect the prediction have zero gradients.
        outputs = [y for _, y in self._outputs]
        self._forward = False
        try:
            found = torch.autograd.grad(
                ends, [*outputs, *starts], grad_outputs=gradients, materialize_grads=True
            )
        finally:
            self._forward = True
        for (name, _), gradient in zip(self._outputs, found, strict=False):
            self._sums[name].add_gradient(gradient, self._mask)
        return list(found[len(outputs) :])


class _Recorded:
    """Stands for ``CheckpointFunction``; computes with a graph, as without a checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _recorded_checkpoints() -> Iterator[None]:
    """Context without re-entrant checkpoints, which have no gradients of single tensors."""
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Recorded  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


def statistics_key(
    model: nn.Module,
    space: SearchSpace,
    batches: InputBatches,
    task: Task | None,
    norm: str,
    seed: int,
) -> str:
    """Content key of layers, weights, inputs and settings."""
    layers = [f"{name} {layer.shape}" for name, layer in space.layers.items()]
    salt = "\n".join([f"3 {norm} {seed} {MAX_POSITIONS} {task} {model}", *layers])
    return fingerprint({**model.state_dict(), **_contents(batches)}, salt)


def _contents(batches: InputBatches) -> dict[str, Tensor]:
    """The inputs by place; those of equal shapes together, whatever the batch size is."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(batches)):
        for name, tensor in named_tensors(batches[i]):
            shape = tuple(tensor.shape[1:])
            found.setdefault(f"inputs {name} {shape}", []).append(tensor.reshape(-1, *shape))
    return {name: torch.cat(parts) for name, parts in found.items()}


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
    """The cached statistics; None if absent or damaged."""
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
