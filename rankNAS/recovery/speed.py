"""How a training computes: memory format, bfloat16, compiled; a measurement chooses.

Channels-last convolutions were measured to be 2.6 times as fast on a CPU. Whether bfloat16 and
``torch.compile`` are faster depends on the machine and the network.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankNAS.copies import without_graphs
from rankNAS.deadline import check_time
from rankNAS.exceptions import UsageError

if TYPE_CHECKING:
    from rankNAS.recovery.loop import Loop

__all__ = ["SPEEDS", "Mode", "fastest", "training_mode"]

logger = logging.getLogger(__name__)
#: Options: measure; as trainings always were; or named parts of a mode, joined by ``+``.
SPEEDS = ("auto", "plain")
PARTS = ("channels_last", "bf16", "compile")
FASTER = 0.9  # of the seconds of a step: a mode must take less to be chosen
STEPS = 3  # that are timed in each mode, after one that is not
LONG = 600.0  # seconds of a training from which trying to compile is worth while


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


def fastest(loop: Loop, speed: str) -> Mode:
    """The mode of a training: the one that is asked for, or the fastest.

    Args:
        loop: The training, before its first step; it is not changed.
        speed: One of `SPEEDS`, or a mode.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    if speed != "auto":
        return Mode() if speed == "plain" else Mode.parse(speed)
    modes = [Mode()]
    if any(p.dim() == 4 for p in loop.network.parameters()):
        modes.append(Mode(channels_last=False))
    chosen = _first_of(loop, modes)
    chosen = _first_of(loop, [chosen, replace(chosen, bf16=True)])
    if loop.total * _seconds(loop, chosen) > LONG:
        chosen = _first_of(loop, [chosen, replace(chosen, compile=True)])
    logger.info("the training computes in the mode %s", chosen)
    return chosen


def _first_of(loop: Loop, modes: list[Mode]) -> Mode:
    """The first mode, unless another one is clearly faster."""
    best = modes[0]
    if len(modes) == 1:
        return best
    least = _seconds(loop, best)
    for mode in modes[1:]:
        try:
            found = _seconds(loop, mode)
        except Exception as error:  # no compiler, or an operation without this type
            logger.info("the mode %s does not work here: %s", mode, error)
            continue
        if found < FASTER * least:
            best, least = mode, found
    return best


def _seconds(loop: Loop, mode: Mode) -> float:
    """The least seconds of a forward and a backward pass; the network ends as it was."""
    network, taken = loop.network, []
    few = loop.samples.take(torch.arange(min(loop.config.batch_size, len(loop.samples))))
    batch = few.example(loop.config.batch_size, loop.device)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    try:
        with training_mode(network, loop.device, mode), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            for _ in range(1 + STEPS):
                check_time()
                started = time.perf_counter()
                loop.loss_of(network, batch, None, mode).backward()
                if loop.device.type == "cuda":
                    torch.cuda.synchronize(loop.device)
                taken.append(time.perf_counter() - started)
    finally:
        network.zero_grad()
        for name, buffer in network.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return min(taken[1:])


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
