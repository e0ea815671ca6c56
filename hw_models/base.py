"""Base classes of hardware models (latency and energy per layer), and tables made from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import DENSE, Choice
from rankNAS.deadline import check_time
from rankNAS.decompositions import OPERATORS, LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.renamed import renamed
from rankNAS.search_spaces.base import Layer, SearchSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankNAS.trees import Inputs

__all__ = [
    "CallableModel",
    "HardwareModel",
    "LatencyTables",
    "StageModel",
    "compile_latency",
    "dtype_of",
    "round_up",
    "stages",
    "tiles",
]

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
DTYPES = {1: "int8", 2: "float16", 4: "float32", 8: "float64"}


@renamed(rest="remainder_cost")
class HardwareModel(ABC):
    """Predicts the latency of a layer under a choice.

    Predictions are additive over layers. They must be positive, and equal for equal arguments
    within one process. Three more methods may be overridden: `bind` prepares the model for a
    network, `remainder_cost` returns the time outside the decomposable layers, and `energy`
    returns the energy of a layer.

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
        """Latency in seconds of all calls in one forward pass, and its standard deviation."""

    def energy(self, layer: Layer, choice: Choice) -> float | None:
        """Energy in joules of all calls in one forward pass; None if unknown."""
        return None

    def remainder_cost(self, space: SearchSpace) -> tuple[float, float]:
        """Latency in seconds outside the layers of a space, and its standard deviation."""
        return 0.0, 0.0

    def bind(
        self,
        network: nn.Module | None,
        space: SearchSpace,
        inputs: Inputs | Tensor | None = None,
        on_progress: Progress | None = None,
    ) -> HardwareModel:
        """The model, prepared for a space. It is called once, before any prediction.

        Args:
            network: The network that the space was compiled from; None if it is not available.
            space: The space, compiled for the batch size to predict.
            inputs: The network's arguments for at least one sample; None if not available.
            on_progress: Called with (steps done, steps in total).

        Raises:
            UsageError: The model was made for another batch size, number of threads or dtype.
        """
        return self


class StageModel(HardwareModel):
    """A hardware model that sums the latencies of the stages of a decomposed layer."""

    @abstractmethod
    def stage(self, shape: LayerShape) -> tuple[float, float]:
        """Latency in seconds of one stage with a single call, and its standard deviation."""

    def stage_energy(self, shape: LayerShape) -> float | None:
        """Energy in joules of one stage with a single call; None if unknown."""
        return None

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        """Sum over stages and calls. Their errors are treated as independent."""
        found = [self.stage(shape) for shape in stages(layer, choice)]
        return sum(s for s, _ in found), math.hypot(*(sigma for _, sigma in found))

    def energy(self, layer: Layer, choice: Choice) -> float | None:
        found = [self.stage_energy(shape) for shape in stages(layer, choice)]
        known = [joules for joules in found if joules is not None]
        return sum(known) if len(known) == len(found) else None


def stages(layer: Layer, choice: Choice) -> Iterator[LayerShape]:
    """The shapes that one forward pass runs for a layer under a choice, one per call."""
    for call in layer.shape.calls:
        shape = replace(layer.shape, calls=(call,))
        if choice == DENSE:
            yield shape
        else:
            yield from OPERATORS[choice.operator].stages(shape, choice.rank)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return tiles(size, multiple) * multiple


def tiles(size: int, of: int) -> int:
    """The number of tiles of size `of` that cover `size`."""
    return -(-size // of)


def dtype_of(shape: LayerShape) -> str:
    """The name of the weights' dtype; two bytes are read as float16."""
    return DTYPES.get(shape.itemsize, f"{8 * shape.itemsize} bits")


@final
@dataclass(frozen=True)
class CallableModel(HardwareModel):
    """A hardware model from a function of layer and choice that returns seconds.

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


@renamed(rest="remainder_cost")
@dataclass(frozen=True)
class LatencyTables:
    """Latency predictions for every choice of a space, as arrays.

    Args:
        choices: The choices of each layer, by layer name.
        seconds: The latency of each choice, in the same order.
        sigma: Standard deviations of the latencies.
        remainder_cost: Latency in seconds outside the layers, and its standard deviation.
        energy: The energy of each choice in joules; None if unknown.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    seconds: Mapping[str, Array]
    sigma: Mapping[str, Array]
    remainder_cost: tuple[float, float] = (0.0, 0.0)
    energy: Mapping[str, Array] | None = None

    @cached_property
    def _places(self) -> dict[str, dict[Choice, int]]:
        return {n: {c: i for i, c in enumerate(choices)} for n, choices in self.choices.items()}

    def predict(self, allocation: Mapping[str, Choice]) -> tuple[float, float]:
        """Latency in seconds of the whole network under an allocation, and its deviation."""
        total, variance = self.remainder_cost[0], self.remainder_cost[1] ** 2
        for name, choice in allocation.items():
            i = self._places[name][choice]
            total += self.seconds[name][i]
            variance += self.sigma[name][i] ** 2
        return float(total), math.sqrt(variance)

    def predict_energy(self, allocation: Mapping[str, Choice]) -> float | None:
        """Energy in joules of the layers under an allocation."""
        if self.energy is None:
            return None
        return float(sum(self.energy[n][self._places[n][c]] for n, c in allocation.items()))

    def restrict(self, choices: Mapping[str, tuple[Choice, ...]]) -> LatencyTables:
        """The tables for a subset of the choices."""
        kept = {n: [self._places[n][c] for c in wanted] for n, wanted in choices.items()}

        def cut(table: Mapping[str, Array]) -> dict[str, Array]:
            return {name: table[name][rows] for name, rows in kept.items()}

        energy = None if self.energy is None else cut(self.energy)
        return LatencyTables(
            choices, cut(self.seconds), cut(self.sigma), self.remainder_cost, energy
        )


def compile_latency(
    model: HardwareModel, space: SearchSpace, on_layer: Progress | None = None
) -> LatencyTables:
    """Latency tables of a hardware model that is bound to a space.

    Raises:
        UsageError: A prediction is not a positive number. The message names it.
        TimeLimitError: The active deadline has passed.
    """
    seconds: dict[str, Array] = {}
    sigma: dict[str, Array] = {}
    energy: dict[str, Array] | None = {}
    for done, (name, layer) in enumerate(space.layers.items(), 1):
        rows = np.array([_checked(model, layer, choice) for choice in layer.choices])
        seconds[name], sigma[name] = rows[:, 0], rows[:, 1]
        joules = [model.energy(layer, choice) for choice in layer.choices]
        known = [j for j in joules if j is not None]
        if energy is not None:
            energy = {**energy, name: np.array(known)} if len(known) == len(joules) else None
        if on_layer is not None:
            on_layer(done, len(space.layers))
    choices = {name: layer.choices for name, layer in space.layers.items()}
    return LatencyTables(choices, seconds, sigma, _checked_rest(model, space), energy or None)


def _checked(model: HardwareModel, layer: Layer, choice: Choice) -> tuple[float, float]:
    check_time()
    seconds, sigma = model.latency(layer, choice)
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(
            f"hardware model {model.name!r} gave {seconds} seconds for layer {layer.name!r} as "
            f"{choice}; expected a positive number."
        )
    if not (math.isfinite(sigma) and sigma >= 0):
        raise UsageError(
            f"hardware model {model.name!r} gave a standard deviation of {sigma} seconds for "
            f"layer {layer.name!r} as {choice}; expected a number from 0."
        )
    return seconds, sigma


def _checked_rest(model: HardwareModel, space: SearchSpace) -> tuple[float, float]:
    seconds, sigma = model.remainder_cost(space)
    if not (math.isfinite(seconds) and seconds >= 0 and math.isfinite(sigma) and sigma >= 0):
        raise UsageError(
            f"hardware model {model.name!r} gave {seconds} ± {sigma} seconds for what is outside "
            "the layers; expected numbers from 0."
        )
    return seconds, sigma
