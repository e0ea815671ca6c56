"""The contract of a hardware model: what one layer costs on a device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from rankNAS.allocation import Choice
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer, SearchSpace

__all__ = ["CallableModel", "HardwareModel", "latency_tables"]


class HardwareModel(ABC):
    """Predicts the latency of a layer under a choice.

    Predictions are additive over layers and cover the decomposable layers only. They must be
    positive, and equal for equal arguments within one process.

    Example:
        >>> class Board(HardwareModel):
        ...     name = "board"
        ...     def latency(self, layer, choice):
        ...         return 1e-6 + layer[choice].macs / 2e9, 0.0
        >>> Board().name
        'board'
    """

    name: str

    @abstractmethod
    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        """Seconds of all calls of the layer in one forward pass, and their standard deviation."""


@final
@dataclass(frozen=True)
class CallableModel(HardwareModel):
    """Any function of a layer and a choice that returns seconds.

    Args:
        fn: Takes a `Layer` (shapes, input sizes, costs) and a `Choice`; returns seconds.
        name: Defaults to the function's name.

    Example:
        >>> model = CallableModel(lambda layer, choice: layer[choice].macs / 1e9)
        >>> model.name
        '<lambda>'
    """

    fn: Callable[[Layer, Choice], float]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.fn, "__name__", "hardware"))

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        return float(self.fn(layer, choice)), 0.0


def latency_tables(
    model: HardwareModel,
    space: SearchSpace,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every choice of every layer, in the order of the space.

    Raises:
        UsageError: A prediction is not a positive number; it is named.
    """
    tables: dict[str, list[float]] = {}
    for done, (name, layer) in enumerate(space.layers.items(), 1):
        tables[name] = [_checked(model, layer, choice) for choice in layer.choices]
        if on_layer is not None:
            on_layer(done, len(space.layers))
    return tables


def _checked(model: HardwareModel, layer: Layer, choice: Choice) -> float:
    seconds, _ = model.latency(layer, choice)
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(
            f"hardware model {model.name!r} gave {seconds} seconds for layer {layer.name!r} as "
            f"{choice}; expected a positive number."
        )
    return seconds
