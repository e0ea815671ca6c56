"""How a training computes: memory format, bfloat16, compiled; a measurement chooses.

Channels-last convolutions were measured to be 2.6 times as fast on a CPU. Whether bfloat16 and
``torch.compile`` are faster depends on the machine and the network.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankNAS.copies import without_graphs
from rankNAS.data.samples import Samples
from rankNAS.data.sizes import affordable_samples
from rankNAS.deadline import TimeLimitError, check_time
from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig

__all__ = ["SPEEDS", "Mode", "Training", "fastest", "training_mode"]

logger = logging.getLogger(__name__)
#: Options: measure; as trainings always were; or named parts of a mode, joined by ``+``.
SPEEDS = ("auto", "plain")
PARTS = ("channels_last", "bf16", "compile")
FASTER = 0.9  # of the seconds of a step: a mode must take less to be chosen
STEPS = 3  # that are timed in each mode, after one that is not
TIMED = 20.0  # seconds after which no more steps are timed in a mode, not even after the first one
COMPILED = 30.0  # seconds of a training, for each of its weights, from which compiling is tried


@dataclass(frozen=True)
class Mode:
    """How a training computes.

    Args:
        channels_last: Whether images and kernels are in channels-last memory format.
        bf16: Whether passes are in bfloat16, with weights in their own type.
        compile: Whether the network is compiled.
    """

    channels_last: bool = True
    bf16: bool = False
    compile: bool = False
    _compiled: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Mode:
        """The mode that ``str`` gives, such as ``channels_last+bf16``.

        Raises:
            UsageError: There is no such mode.
        """
        names = [] if text == "none" else text.split("+")
        if unknown := [name for name in names if name not in PARTS]:
            raise UsageError(
                f"speed is {unknown[0]!r}, but it must be auto, plain, none, or some of "
                f"{', '.join(PARTS)} joined by +."
            )
        layout, bf16, compiled = (part in names for part in PARTS)
        return cls(layout, bf16, compiled)

    def __str__(self) -> str:
        return "+".join(part for part in PARTS if getattr(self, part)) or "none"

    def runner(self, network: nn.Module) -> Any:
        """What is called in a pass of the network."""
        if not self.compile:
            return network
        key = id(network)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(network)
        return self._compiled[key]


class Training(Protocol):
    """What is measured: a training before its first step.

    Attributes:
        network: The network.
        samples: The training samples.
        config: Its length and batches.
        device: Where it runs.
        total: The number of its steps.
    """

    network: nn.Module
    samples: Samples
    config: TrainingConfig
    device: torch.device
    total: int

    def loss_of(self, network: nn.Module, batch: Any, place: None, mode: Mode) -> Tensor:
        """The loss of a batch in a mode, with gradients."""


def fastest(training: Training, speed: str, seconds: float = math.inf) -> Mode:
    """The mode of a training: the one that is asked for, or the fastest.

    Args:
        training: The training; it is not changed.
        speed: One of `SPEEDS`, or a mode.
        seconds: Seconds of the training, at most.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    if speed != "auto":
        return Mode() if speed == "plain" else Mode.parse(speed)
    chosen = Mode()
    least = _seconds(training, chosen)
    if any(p.dim() == 4 for p in training.network.parameters()):
        chosen, least = _faster(training, chosen, least, Mode(channels_last=False))
    chosen, least = _faster(training, chosen, least, replace(chosen, bf16=True))
    weights = sum(p.dim() > 1 for p in training.network.parameters())
    if min(training.total * least, seconds) > COMPILED * weights:
        chosen, _ = _faster(training, chosen, least, replace(chosen, compile=True))
    logger.info("the training computes in the mode %s", chosen)
    return chosen


def _faster(training: Training, best: Mode, least: float, mode: Mode) -> tuple[Mode, float]:
    """The best mode and the seconds of its steps, or another one that is clearly faster."""
    try:
        found = _seconds(training, mode, least)
    except TimeLimitError:
        raise
    except Exception as error:  # no compiler, or an operation without this type
        logger.info("the mode %s does not work here: %s", mode, error)
        return best, least
    return (mode, found) if found < FASTER * least else (best, least)


def _seconds(training: Training, mode: Mode, least: float = math.inf) -> float:
    """The least seconds of a forward and a backward pass; the network ends as it was.

    Args:
        training: The training.
        mode: The mode.
        least: Seconds of another mode; no more passes are timed after one of twice as many.
    """
    network, device, size = training.network, training.device, training.config.batch_size
    taken: list[float] = []
    count = max(2, affordable_samples(size, training.samples))
    few = training.samples.take(torch.arange(min(count, len(training.samples))))
    batch = few.example(size, device)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    try:
        with training_mode(network, device, mode), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            for _ in range(1 + STEPS):
                check_time()
                started = time.perf_counter()
                training.loss_of(network, batch, None, mode).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append(time.perf_counter() - started)
                if (len(taken) > 1 and taken[-1] > 2 * least) or sum(
                    taken[mode.compile :]
                ) > TIMED:
                    break
    finally:
        network.zero_grad()
        for name, buffer in network.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return min(taken[1:] or taken)


@contextmanager
def training_mode(network: nn.Module, device: torch.device, mode: Mode) -> Iterator[None]:
    """Context in train mode, with torch's random state saved and the mode's memory format.

    Modules that keep tensors of a forward pass keep none with a graph. The weights are restored to
    the default memory format, which safetensors and matrix decompositions expect.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), without_graphs(network):
        network.train()
        if mode.channels_last and device.type == "cpu":
            _reorder(network, torch.channels_last)
        try:
            yield
        finally:
            _reorder(network, torch.contiguous_format)
            network.eval()


def _reorder(network: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
